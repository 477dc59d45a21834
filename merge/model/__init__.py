"""Generative model of merged data: scales, structure factors, priors, likelihood."""
