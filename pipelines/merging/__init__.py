"""Merging alone."""
