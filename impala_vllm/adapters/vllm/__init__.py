"""vLLM: the only package that imports it. Everything here is translation."""
