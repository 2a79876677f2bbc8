"""Recorded agent sessions replayed against a real vLLM server over HTTP, and what to measure there."""
