"""Inputs of a merge: files, groups, reindexing, repeated photons."""
