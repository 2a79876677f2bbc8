"""Moves KV bytes between tiers: no policy, no vLLM."""
