"""Starts, steps and choices of a fit in memory."""
