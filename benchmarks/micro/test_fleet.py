"""What the router's own work costs: a decision for a long prompt against 64 servers, a block stored, a replica lost."""

from random import Random

import msgspec
import pytest

from impala_vllm.adapters.vllm.blocks import Blocks, _Copy
from impala_vllm.core.types import Namespace, Outcome
from impala_vllm.fleet.events.wire import decode
from impala_vllm.fleet.hashing import Prompt
from impala_vllm.fleet.index import IndexConfig, MaskIndex
from impala_vllm.fleet.places import BlockKey, Replica, ServerId, Tier
from impala_vllm.fleet.registry import SharedIndex
from impala_vllm.fleet.residency import Residency
from impala_vllm.fleet.router import Router, Turn
from impala_vllm.fleet.scoring import Load, Policy, Question

REPLICAS = [Replica(ServerId(f"http://10.0.0.{i}:8000")) for i in range(64)]
NUM_TOKENS, BLOCK_TOKENS = 142_000, 16
STEM_BLOCKS = 1200


def keys(seed: int, number: int) -> list[BlockKey]:
    lot = Random(seed)
    return [BlockKey(lot.getrandbits(64)) for _ in range(number)]


@pytest.fixture(scope="module")
def stem():
    return keys(0, STEM_BLOCKS)


@pytest.fixture(scope="module")
def chains():
    return [keys(1 + trace, NUM_TOKENS // BLOCK_TOKENS - STEM_BLOCKS) for trace in range(64)]


@pytest.fixture(scope="module")
def index(stem, chains):
    """Every server holds the stem and a trace of 142k tokens: half a million blocks."""
    index = MaskIndex()
    for replica in REPLICAS:
        index.store(replica, Tier.HBM, stem, 0.0)
    for number, chain in enumerate(chains):
        index.store(REPLICAS[number % 64], Tier.HBM, chain, 0.0)
    return index


def test_prefixes_of_142k_tokens_on_64_servers(benchmark, index, stem, chains):
    prompts = [stem + chain for chain in chains]
    lot = Random(1)
    benchmark.pedantic(index.prefixes, setup=lambda: ((lot.choice(prompts),), {}), rounds=500)


def test_choice_among_64_servers(benchmark, index, stem, chains):
    loads = {replica: Load() for replica in REPLICAS}
    question = Question(NUM_TOKENS, BLOCK_TOKENS, index.prefixes(stem + chains[0]), REPLICAS[0], 64, 64)
    policy, lot = Policy(), Random(1)
    benchmark(policy.choose, question, loads, lot)


def test_turn_of_a_known_trace_from_arrival_to_end(benchmark, index, stem, chains):
    loads = {replica: Load() for replica in REPLICAS}
    router = Router(loads, Residency(index, IndexConfig()), Policy(), Random(1))
    turns = [Turn(Namespace(), Prompt(stem + chain, NUM_TOKENS, 0), BLOCK_TOKENS, NUM_TOKENS) for chain in chains]
    clock = iter(range(10**9))

    def serve(turn: Turn) -> None:
        now = float(next(clock))
        ticket = router.start(turn, loads, (), now)
        assert ticket is not None
        router.answer(ticket, now + 0.1)
        router.end(ticket, Outcome.STOP, True, now + 0.2)

    for turn in turns:
        serve(turn)
    lot = Random(2)
    benchmark.pedantic(serve, setup=lambda: ((lot.choice(turns),), {}), rounds=500)


def test_store_of_128_blocks(benchmark, index):
    lot = Random(3)

    def batch():
        return (REPLICAS[lot.randrange(64)], Tier.HBM, [BlockKey(lot.getrandbits(64)) for _ in range(128)], 1.0), {}

    benchmark.pedantic(index.store, setup=batch, rounds=500)


def test_loss_of_a_replica_in_half_a_million_blocks(benchmark, index):
    left = list(REPLICAS)
    benchmark.pedantic(index.clear, setup=lambda: ((left.pop(),), {}), rounds=60)


def test_decode_of_a_batch_of_128_blocks(benchmark):
    """As vLLM writes it: hashes of 32 bytes, token ids that are skipped."""
    lot = Random(4)
    event = {
        "type": "BlockStored",
        "block_hashes": [lot.randbytes(32) for _ in range(128)],
        "parent_block_hash": lot.randbytes(32),
        "token_ids": [lot.randrange(128_000) for _ in range(128 * BLOCK_TOKENS)],
        "block_size": BLOCK_TOKENS,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    payload = msgspec.msgpack.encode([1.0, [event], 0])
    assert len(decode(payload).events) == 1
    benchmark.pedantic(decode, args=(payload,), rounds=500)


def test_copy_of_an_engines_blocks_for_a_snapshot(benchmark):
    """What the engine loop waits for when a router asks for a snapshot: the keys of 100,000 blocks."""
    lot = Random(5)
    cache = {lot.randbytes(36): None for _ in range(100_000)}
    benchmark.pedantic(list, args=(cache,), rounds=50)


def test_page_of_10_000_blocks_of_a_snapshot(benchmark):
    lot = Random(6)
    blocks = Blocks()
    found = [lot.randbytes(36) for _ in range(10_000)]

    def page():
        blocks._copies["t"] = _Copy(found, 0.0, float("inf"))
        return (None, "t:0", 10_000), {}

    benchmark.pedantic(blocks.page, setup=page, rounds=100)


def test_telling_128_changed_blocks(benchmark, index):
    """Noting what a router has to tell others, and what is written to Redis without the writing."""
    shared, lot = SharedIndex(MaskIndex()), Random(7)
    shared.begin_telling(REPLICAS[0])
    shared.take_renewed()

    def tell(fresh: list[BlockKey]) -> None:
        shared.store(REPLICAS[0], Tier.HBM, fresh, 1.0)
        shared.take_unsaid(REPLICAS[:1])

    benchmark.pedantic(tell, setup=lambda: (([BlockKey(lot.getrandbits(64)) for _ in range(128)],), {}), rounds=300)
