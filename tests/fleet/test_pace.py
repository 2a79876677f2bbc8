"""How often servers are looked at, and what is said where they cannot be."""

import logging
from random import Random

from impala_vllm.fleet.asking import AskingConfig
from impala_vllm.fleet.pace import AGAIN_S, MAX_AGAIN_S, Pace


def pauses_s(pace: Pace, is_down: bool) -> list[float]:
    return [pace.pause_s(is_down) for _ in range(200)]


def test_a_server_that_is_down_is_looked_at_more_often_unless_hundreds_are():
    pace = Pace(AskingConfig(), Random(0))
    pace.num_down = 1
    assert max(pauses_s(pace, is_down=True)) <= 0.625
    assert min(pauses_s(pace, is_down=False)) >= 1.5
    pace.num_down = 1000
    assert 200 / sum(pauses_s(pace, is_down=True)) * pace.num_down < 220, "looks a second at all of them"
    assert max(pauses_s(pace, is_down=False)) <= 2.5


def test_servers_that_were_lost_together_are_not_asked_together():
    pace = Pace(AskingConfig(), Random(0))
    assert len(set(pauses_s(pace, is_down=True))) == 200


def test_a_shortage_is_told_once_until_it_was_over(caplog):
    caplog.set_level(logging.ERROR)
    pace = Pace(AskingConfig(), Random(0))
    for second in range(300):
        pace.is_short(OSError("too many open files"), float(second))
    assert len(caplog.records) == 1
    pace.is_short(OSError("too many open files"), 300.0 + AGAIN_S)
    assert len(caplog.records) == 2


def test_what_fails_again_and_again_is_tried_ever_more_seldom():
    pace = Pace(AskingConfig(every_s=2.0), Random(0))
    pauses = [pace.again_s(number) for number in (1, 2, 3, 4, 1000)]
    assert all(0.75 <= pause / mean <= 1.25 for pause, mean in zip(pauses, (2, 4, 8, 16, MAX_AGAIN_S), strict=True))
