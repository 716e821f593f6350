"""Scripts that run in the peers' throw-away environment, and the code that starts them.

This file imports nothing, because a peer's process imports it too.
"""
