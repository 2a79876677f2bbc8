"""A model that vLLM can be configured for; none of these tests loads it."""

import pytest


@pytest.fixture(scope="module")
def model():
    from impala_vllm.plugin import register
    from impala_vllm.replay import tiny_model

    register()
    return str(tiny_model.build("1m"))
