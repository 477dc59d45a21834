"""Simulated data in files."""
