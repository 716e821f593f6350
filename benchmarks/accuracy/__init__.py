"""Measure errors: coverage of intervals, closed forms, precisions, two-stage models."""
