"""Indexing ambiguity: operators, choice image by image, doubts about the symmetry."""
