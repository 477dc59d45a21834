"""Likelihood of a measurement given its expected intensity."""
