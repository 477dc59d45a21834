"""Records of a result, read back against their schemas."""
