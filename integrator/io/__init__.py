"""Adapters for foreign file formats: one file each, converting to our units and frames."""
