"""Draw from a trained pair."""
