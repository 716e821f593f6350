"""Record a Pyro program once, compile it, replay it."""
