"""Merging of measured intensities (I, sigma) from any program: rotation, Laue, stills."""
