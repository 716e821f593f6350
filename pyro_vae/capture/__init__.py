"""Capture a Pyro program: run it once, save its tensor operations, compile and replay them."""
