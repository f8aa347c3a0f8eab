"""Solvers of selection problems: pure functions on arrays."""
