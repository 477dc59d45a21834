"""DIALS as subprocesses."""
