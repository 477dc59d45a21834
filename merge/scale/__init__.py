"""Scale of an observation: terms and networks."""
