"""Geometry, symmetry and intensity corrections; depends on nothing else of ours."""
