"""Modules that return distributions: priors, likelihoods, posteriors."""
