"""The hashes, against vLLM's own functions on vLLM's own requests."""

import random

import pytest

from impala_vllm.fleet.hashing.scheme import Adapter, Scheme, SchemeError, function
from impala_vllm.fleet.places import keys_of

ALGORITHMS = ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"]


@pytest.fixture
def vllm(monkeypatch):
    utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    from vllm.utils.hashing import get_hash_fn_by_name

    monkeypatch.setenv("PYTHONHASHSEED", "42")

    def start(algorithm):
        made = get_hash_fn_by_name(algorithm)
        utils.init_none_hash(made)
        return utils, made

    return start


def request_of(tokens, hasher, salt=None, lora=None, media=None):
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id="r",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        mm_features=media,
        lora_request=lora,
        cache_salt=salt,
        block_hasher=hasher,
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [16, 32])
def test_prompts_hash_as_the_engine_hashes_them(vllm, algorithm, size):
    utils, made = vllm(algorithm)
    scheme = Scheme(algorithm, function(algorithm)("42"), size)
    assert scheme.none_hash == utils.NONE_HASH
    tokens = random.Random(1).choices(range(200_000), k=size * 9 + 5)
    hasher = utils.get_request_block_hasher(size, made)
    for salt in (None, "tenant"):
        found = request_of(tokens, hasher, salt).block_hashes
        chain = scheme.chain(tokens, salt=salt)
        assert chain.keys == keys_of(found)
        assert chain.last == found[-1]
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("sql", 3, "/adapters/sql")
    found = request_of(tokens, hasher, "tenant", lora).block_hashes
    assert scheme.chain(tokens, salt="tenant", adapter=Adapter("sql", "/adapters/sql")).keys == keys_of(found)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_block_with_an_image_hashes_as_the_engine_hashes_it(vllm, algorithm):
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    utils, made = vllm(algorithm)
    scheme = Scheme(algorithm, function(algorithm)("42"), 16)
    tokens = list(range(64))
    media = [MultiModalFeatureSpec(None, "image", "digest", PlaceholderRange(offset=20, length=8))]
    found = request_of(tokens, utils.get_request_block_hasher(16, made), media=media).block_hashes
    first = scheme.block(None, tokens[:16], None)
    assert [first, scheme.block(first, tokens[16:32], (("mm", "digest", 4),))] == found[:2]


def test_a_chain_goes_on_from_where_it_was_left():
    scheme = Scheme("sha256", b"seed", 16)
    tokens = list(range(1000, 1100))
    adapter = Adapter("a", "/a")
    whole = scheme.chain(tokens, salt="s", adapter=adapter)
    first = scheme.chain(tokens[:48], salt="s", adapter=adapter)
    rest = scheme.chain(tokens[48:], first.last, salt="s", adapter=adapter)
    assert [*first.keys, *rest.keys] == whole.keys
    assert rest.last == whole.last


def test_what_differs_in_salt_adapter_or_seed_shares_nothing():
    tokens = list(range(64))
    scheme = Scheme("sha256", b"seed", 16)
    chains = [
        scheme.chain(tokens),
        scheme.chain(tokens, salt="a"),
        scheme.chain(tokens, salt="b"),
        scheme.chain(tokens, adapter=Adapter("a", "/a")),
        scheme.chain(tokens, adapter=Adapter("a", "/b")),
        Scheme("sha256", b"other", 16).chain(tokens),
    ]
    keys = [key for chain in chains for key in chain.keys]
    assert len(set(keys)) == len(keys)


def test_less_than_a_block_has_no_hash():
    assert Scheme("sha256", b"seed", 16).chain(list(range(15))) == ([], None)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(SchemeError, match="unknown hash algorithm 'md5'; known are sha256"):
        function("md5")
