"""One module per command of ``braggflux``: its docstring is its help."""
