"""Prometheus pages."""

from impala_vllm.replay.counters import computed_tokens, observer_s, parse, tiers

PAGE = """# HELP vllm:prompt_tokens_total Number
vllm:prompt_tokens_total{engine="0",model_name="a b} c"} 100.0
vllm:prompt_tokens_total{engine="1"} 20
vllm:prefix_cache_hits_total{engine="0"} 4.5e1
plain 3
broken{x="y"}
"""


def test_samples_are_summed_over_labels_and_bad_lines_skipped() -> None:
    assert parse(PAGE) == {"vllm:prompt_tokens_total": 120.0, "vllm:prefix_cache_hits_total": 45.0, "plain": 3.0}


def test_computed_tokens_are_those_that_were_not_found() -> None:
    assert computed_tokens({"vllm:prompt_tokens_total": 20.0}, parse(PAGE)) == 55
    assert computed_tokens({}, {"plain": 3.0}) is None


def test_tokens_loaded_from_a_tier_were_not_computed() -> None:
    loaded = {"vllm:external_prefix_cache_hits_total": 5.0}
    assert computed_tokens({"vllm:prompt_tokens_total": 20.0}, parse(PAGE) | loaded) == 50


def test_tiers_are_told_by_the_growth_of_their_own_counters() -> None:
    after = {"impala_kv_host_load_bytes_total": 7.0, "impala_kv_host_used_bytes": 9.0, "vllm:prompt_tokens_total": 1.0}
    assert tiers({"impala_kv_host_load_bytes_total": 3.0}, after) == {"host_load_bytes": 4.0}


def test_time_in_impala_is_the_growth_of_its_own_clock() -> None:
    before, after = {"impala_observer_seconds_total": 1.5}, {"impala_observer_seconds_total": 1.75}
    assert observer_s(before, after) == 0.25
    assert observer_s({}, {}) is None
