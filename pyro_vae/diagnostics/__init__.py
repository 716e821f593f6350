"""Diagnostics of a trained pair: collapse, information, inference gap, disentanglement, and export to ArviZ."""
