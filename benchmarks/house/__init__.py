"""Measure the structure of the package's source: files, imports, site dictionaries, copies and English.

``python -m benchmarks.house`` measures this tree; ``tests/test_house.py`` holds it to limits.
"""
