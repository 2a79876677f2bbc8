"""What is kept of a request."""

import json
import threading

import pytest

from impala_vllm.config import MetadataConfig
from impala_vllm.fleet.families import Family
from impala_vllm.fleet.fleet import Fleet, Serving
from impala_vllm.fleet.hashing import handshake
from impala_vllm.fleet.index import MaskIndex
from impala_vllm.fleet.proxy import reading
from impala_vllm.fleet.proxy.reading import MAX_DECODED_HERE, MAX_NAME_CHARS, Reader
from tests.fleet.hashing.test_handshake import hello


@pytest.fixture
def reader():
    found = Reader(Fleet(MaskIndex()), MetadataConfig())
    yield found
    found.close()


async def test_names_of_any_length_are_kept_short_and_apart(reader):
    turns = []
    for end in "ab":
        name = "n" * 100_000 + end
        body = json.dumps({"model": name, "cache_salt": name, "session_id": name}).encode()
        turns.append((await reader.read("/v1/completions", {"x-parent-session-id": name}, body)).turn)
    for turn in turns:
        names = (turn.session_id, turn.parent_session_id, turn.namespace.salt, turn.namespace.model)
        assert all(0 < len(name) <= MAX_NAME_CHARS for name in names)
    assert turns[0].session_id != turns[1].session_id
    assert turns[0].namespace != turns[1].namespace


async def test_short_names_stay_as_they_are(reader):
    body = b'{"model": "m", "cache_salt": "s", "session_id": "t"}'
    turn = (await reader.read("/v1/completions", {}, body)).turn
    assert (turn.namespace.model, turn.namespace.salt, turn.session_id) == ("m", "s", "t")


async def test_a_prompt_that_is_not_known_is_guessed_by_its_bytes_up_to_what_the_model_takes(reader, monkeypatch):
    body = json.dumps({"prompt": {"image": "A" * 40_000}}).encode()
    assert (await reader.read("/v1/completions", {}, body)).turn.num_tokens == len(body) // 4
    said = hello()
    family = Family(said, handshake.scheme_of(said))
    monkeypatch.setattr(reader._fleet, "serving", lambda model: Serving({}, family, None))
    assert (await reader.read("/v1/completions", {}, body)).turn.num_tokens == said.max_model_len == 1000


async def test_a_large_body_is_read_as_a_small_one(reader):
    body = json.dumps({"stream": True, "prompt": "x" * 2 * MAX_DECODED_HERE}).encode()
    assert (await reader.read("/v1/completions", {}, body)).is_stream


async def test_a_large_body_is_decoded_once_and_not_on_the_event_loop(reader, monkeypatch):
    threads = []
    decode = reading.msgspec.json.decode

    def watched(body: bytes):
        threads.append(threading.current_thread())
        return decode(body)

    monkeypatch.setattr(reading.msgspec.json, "decode", watched)
    body = json.dumps({"metadata": {"session_id": "t"}, "prompt": "x" * MAX_DECODED_HERE}).encode()
    assert (await reader.read("/v1/completions", {}, body)).turn.session_id == "t"
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize("limit", ["MAX_DECODED", "MAX_OPENED"])
async def test_of_a_huge_body_only_the_outlines_are_decoded(reader, monkeypatch, limit):
    monkeypatch.setattr(reading, limit, 1000)
    fields = {"model": "m", "stream": True, "metadata": {"session_id": "t"}, "prompt": "[" * 2 * MAX_DECODED_HERE}
    body = json.dumps(fields).encode()
    read = await reader.read("/v1/completions", {}, body)
    assert (read.model, read.is_stream, read.turn.session_id) == ("m", True, "t")
    assert "prompt" not in reading._decode(body)
    assert reading._decode(b"[" * 2 * MAX_DECODED_HERE) == {}


def test_code_is_no_huge_body():
    body = json.dumps({"prompt": "{x[0]}" * 10_000}).encode()
    assert "prompt" in reading._decode(body)
