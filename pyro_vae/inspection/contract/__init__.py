"""The contract of a pair: checks of its programs on a few data, and what they compare."""
