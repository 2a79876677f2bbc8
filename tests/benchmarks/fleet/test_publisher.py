"""Events that name their tokens, for routers that hash for themselves."""

from benchmarks.fleet.publisher import Publisher
from impala_vllm.fleet.places import key_of

KEYS = [key_of(i) for i in range(6)]
TOKENS = list(range(6 * 16 + 5))


async def test_each_run_of_new_blocks_is_told_behind_its_parent_with_its_tokens():
    publisher = Publisher()
    try:
        first, second = publisher.stored_chain(KEYS, [KEYS[1], KEYS[2], KEYS[5]], TOKENS)
    finally:
        await publisher.close()
    assert (first["block_hashes"], first["parent_block_hash"]) == (KEYS[1:3], KEYS[0])
    assert first["token_ids"] == TOKENS[16:48]
    assert (second["block_hashes"], second["parent_block_hash"]) == (KEYS[5:], KEYS[4])
    assert second["token_ids"] == TOKENS[80:96]


async def test_a_new_prompt_has_no_parent():
    publisher = Publisher()
    try:
        (event,) = publisher.stored_chain(KEYS, KEYS, ())
        assert not publisher.stored_chain(KEYS, [], ())
    finally:
        await publisher.close()
    assert (event["block_hashes"], event["parent_block_hash"], event["token_ids"]) == (KEYS, None, [])
