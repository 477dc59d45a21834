"""Boxes of one sweep, or of a range of its frames."""
