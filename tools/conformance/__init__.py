"""Parallel layouts compared with one process and with float64: `python -m tools.conformance`."""
