"""What the latents of a trained pair carry, and where a bound is lost."""
