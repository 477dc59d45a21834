"""Packed chunks that may be damaged: followed first, or decoded where a crash is harmless."""
