"""Proposals fitted to each datum."""
