"""Servers whose events never have what they were sent."""

import logging

from impala_vllm.fleet.echo import AFTER_S, MAX_WAITING, NUM_SILENT, Echo
from impala_vllm.fleet.places import BlockKey, Replica, ServerId

A = Replica(ServerId("http://a"))


def serve(echo: Echo, keys: range, now: float = 0.0) -> None:
    for key in keys:
        echo.expect(A, BlockKey(key), now)
    echo.look(now + AFTER_S)


def test_a_server_without_an_echo_is_named_once(caplog):
    caplog.set_level(logging.WARNING)
    echo = Echo(lambda *_: False)
    serve(echo, range(NUM_SILENT - 1))
    assert not caplog.records
    serve(echo, range(2 * NUM_SILENT))
    (record,) = caplog.records
    assert "chat template" in record.getMessage()
    assert echo.silent == {A}


def test_one_that_mostly_answers_is_not_named(caplog):
    echo = Echo(lambda _, key: key % 2 == 0)
    serve(echo, range(MAX_WAITING))
    assert not caplog.records


def test_events_have_time_to_come():
    echo = Echo(lambda *_: False)
    for key in range(MAX_WAITING):
        echo.expect(A, BlockKey(key), 0.0)
    echo.look(AFTER_S / 2)
    assert not echo.silent
    echo.look(AFTER_S)
    assert echo.silent


def test_a_server_that_lost_its_kv_is_judged_anew():
    echo = Echo(lambda *_: False)
    for key in range(NUM_SILENT):
        echo.expect(A, BlockKey(key), 0.0)
    echo.forget(A)
    echo.look(AFTER_S)
    assert not echo.silent
