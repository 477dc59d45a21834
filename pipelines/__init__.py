"""Pipelines of integrator and merge: commands, settings, run directory, report."""
