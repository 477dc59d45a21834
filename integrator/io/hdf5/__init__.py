"""Frames in HDF5 files: NXmx and what detectors make of it."""
