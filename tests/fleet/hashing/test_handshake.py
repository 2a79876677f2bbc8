"""Handshakes: believed where the example proves them, refused with a reason otherwise."""

import msgspec
import pytest

from impala_vllm.fleet.hashing import handshake
from impala_vllm.fleet.hashing.handshake import Group, Hello, HelloError, Rank
from impala_vllm.fleet.hashing.scheme import Scheme, function


def hello(algorithm="sha256", seed="s", block_tokens=16, **more) -> Hello:
    none_hash = function(algorithm)(seed)
    rank = Rank(
        dp_rank=0,
        epoch="e",
        algorithm=algorithm,
        none_hash=none_hash.hex(),
        block_tokens=block_tokens,
        groups=[Group(block_tokens, "full_attention")],
        probe=handshake.probe(Scheme(algorithm, none_hash, block_tokens)),
        **{name: more.pop(name) for name in ("events",) if name in more},
    )
    fields = {"version": 1, "vllm_version": "0.32.0", "model": "m", "tokenizer": "m", "dtype": "float32"}
    return Hello(**{**fields, "max_model_len": 1000, "ranks": [rank], **more})


def test_a_handshake_gives_the_scheme():
    read = handshake.read(msgspec.json.encode(hello()))
    assert read == hello()
    assert handshake.scheme_of(read) == Scheme("sha256", function("sha256")("s"), 16)


def test_an_example_that_does_not_fit_is_refused():
    (rank,) = hello().ranks
    for probe in (["00", "11"], [], rank.probe[:1], rank.probe[::-1]):
        with pytest.raises(HelloError, match="hashes otherwise"):
            handshake.scheme_of(hello(ranks=[msgspec.structs.replace(rank, probe=probe)]))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"has_prefix_caching": False}, "prefix caching is off"),
        ({"ranks": []}, "no engine answered"),
        ({"ranks": [*hello().ranks, *hello(seed="t").ranks]}, "PYTHONHASHSEED"),
        ({"ranks": [msgspec.structs.replace(hello().ranks[0], algorithm="md5")]}, "unknown hash algorithm"),
        ({"ranks": [msgspec.structs.replace(hello().ranks[0], none_hash="xy")]}, "rank 0"),
        ({"ranks": [msgspec.structs.replace(hello().ranks[0], block_tokens=0)]}, "rank 0"),
    ],
)
def test_what_cannot_match_is_refused_with_a_reason(wrong, reason):
    with pytest.raises(HelloError, match=reason):
        handshake.scheme_of(hello(**wrong))


def test_servers_that_differ_are_told_how():
    assert handshake.differences(hello(), hello()) == []
    assert handshake.differences(hello(), hello(dtype="bfloat16")) == ["dtype: bfloat16 here, float32 there"]
    assert "other hashes" in handshake.differences(hello(), hello(seed="t"))[0]


def test_what_is_no_handshake_is_one_line():
    for body in (b"", b"{}", b"[]", b'{"version": "x"}'):
        with pytest.raises(HelloError, match="not a handshake"):
            handshake.read(body)
    with pytest.raises(HelloError, match="version 2"):
        handshake.read(msgspec.json.encode(hello(version=2)))


def test_the_first_group_with_full_attention_stands_for_a_prefix():
    (rank,) = hello().ranks
    hybrid = msgspec.structs.replace(rank, groups=[Group(16, "sliding_window"), Group(16, "full_attention")])
    assert handshake.group_of(hello(ranks=[hybrid])) == 1
    longer = msgspec.structs.replace(rank, groups=[Group(64, "full_attention")])
    with pytest.raises(HelloError, match="blocks of 64 tokens"):
        handshake.group_of(hello(ranks=[longer]))
