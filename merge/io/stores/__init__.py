"""Unmerged observations in HDF5 stores, read image by image."""
