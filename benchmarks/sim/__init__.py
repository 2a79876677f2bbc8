"""The simulator against vLLM's own scheduler in virtual time, and policies against each other."""
