"""Shared by the scripts: save results, time rows in turns, build tables, run the peers."""
