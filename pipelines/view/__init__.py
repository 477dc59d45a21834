"""Pages on a finished run for a browser on the same machine: frames, reflections, maps."""
