"""Identity against a naive owner on recorded sessions: `python -m benchmarks.identity --traces FILE_OR_DIR`."""
