"""Priors of structure-factor amplitudes."""
