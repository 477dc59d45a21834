"""Merged and unmerged reflections in and out of files."""
