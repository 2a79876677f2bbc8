"""How long a server may say nothing before its requests are given up."""

from impala_vllm.fleet.flights import Flights


def test_silence_counts_from_the_first_look_that_got_nothing():
    flights = Flights(20.0)
    assert [flights.silent(at_s, at_s + 5.0) for at_s in (0.0, 7.0, 14.0, 15.0)] == [False, False, False, True]


def test_a_word_ends_a_silence():
    flights = Flights(20.0)
    assert not flights.silent(0.0, 5.0)
    flights.heard()
    assert not flights.silent(14.0, 33.9)
    assert flights.silent(33.0, 34.0)
