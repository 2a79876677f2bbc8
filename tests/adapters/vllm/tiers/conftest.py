"""Sides of a transfer, of which nothing may be left in /dev/shm."""

import os

import pytest


@pytest.fixture
def maker():
    from tests.adapters.vllm.tiers.sides import Maker

    made = Maker()
    yield made
    made.close()
    assert not os.path.exists(f"/dev/shm/vllm_offload_{made.engine_id}.mmap")
