"""report.html and the terminal tables, rebuilt from the files of a run directory."""
