"""Run directory, log, provenance and device."""
