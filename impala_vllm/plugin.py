"""The vLLM entry point: called in every vLLM process, possibly more than once."""


def register() -> None:
    """Make impala selectable; change nothing that was not asked for."""
