"""Measure the package: its speed, its accuracy, published figures, and its structure.

``benchmarks/README.md`` lists the scripts. Run them from the project's root, e.g. ``python -m benchmarks.speed.epoch``.
"""
