"""Comparison with DIALS."""
