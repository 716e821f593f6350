"""Random state, memory, files and processes: what every long run needs."""
