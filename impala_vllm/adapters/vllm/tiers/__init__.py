"""Tiers below HBM behind vLLM's OffloadingConnector: a manager in the scheduler process, a worker that moves bytes."""
