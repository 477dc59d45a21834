"""Figures of the report, by subject, and their registry."""
