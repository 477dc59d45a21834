"""Where and when the reflections of a crystal in a beam are recorded."""
