"""Benchmarks: identity, micro (pytest-benchmark), sim and serving; records in `results/`, tables in RESULTS.md."""
