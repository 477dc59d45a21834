"""Compiled loops over the pixels of frames and boxes."""
