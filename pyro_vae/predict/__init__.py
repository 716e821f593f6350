"""Draws from a trained pair."""
