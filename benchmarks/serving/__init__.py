"""A real vLLM engine under recorded sessions: `python -m benchmarks.serving EXPERIMENT`."""
