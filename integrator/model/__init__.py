"""Generative model of a shoebox and its amortized posterior."""
