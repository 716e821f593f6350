"""The report of a run: figures, tables and ``report.md``."""
