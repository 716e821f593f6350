"""Random state, memory, files and processes, for every long run."""
