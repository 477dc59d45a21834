"""What composes integrator and merge and talks to people: commands, run directory, report."""
