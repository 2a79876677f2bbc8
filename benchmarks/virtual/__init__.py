"""vLLM's real scheduler, with and without impala, in virtual time: `python -m benchmarks.virtual`."""
