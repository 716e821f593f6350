"""Train a pair: arguments, steps, the loop, its run folder."""
