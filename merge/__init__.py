"""Photon-count likelihoods or unmerged intensities to structure-factor posteriors."""
