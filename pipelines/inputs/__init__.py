"""What a merge is given: files, groups, reindexing, repeated photons."""
