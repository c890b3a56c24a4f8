"""Measurements beside peers. Each module is a program; results go to benchmarks/results as JSON."""
