"""Runs whose numbers this repository quotes: one module or config, and one command, for each."""
