"""Time training, evaluation and their start beside other ways to do the same."""
