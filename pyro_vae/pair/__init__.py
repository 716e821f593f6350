"""A model and a guide over the same latents, and their log-densities."""
