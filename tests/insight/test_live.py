"""What `impala top` makes of a server's pages."""

import pytest

from impala_vllm.insight import live

HEALTH = {
    "status": "degraded",
    "reasons": ["rank 0: the scheduler is paused"],
    "mode": "enforce",
    "ranks": [{"running": 3, "waiting": 2}, {"running": 1, "waiting": 0}],
}


def row(name, state="running", tokens=100, **fields):
    known = {"trace_id": name, "parent_trace_id": None, "state": state, "tokens": tokens, "turns": 1}
    return {**known, "age_s": 5.0, "silent_s": 1.0, "source": "new", "confidence": 0.5, **fields}


def pages(*rows):
    return [{"ranks": [{"rank": 0, "rows": list(rows)}]}]


def metrics(computed=60, hbm=30, external=10, output=5):
    return f"""# HELP vllm:prompt_tokens_by_source_total by source
vllm:prompt_tokens_by_source_total{{engine="0",model_name="a,b=\\"c}} d",source="local_compute"}} {computed}
vllm:prompt_tokens_by_source_total{{engine="0",model_name="m",source="local_cache_hit"}} {hbm}
vllm:prompt_tokens_by_source_total{{engine="0",model_name="m",source="external_kv_transfer"}} {external}
vllm:generation_tokens_total{{engine="0"}} {output}
vllm:kv_cache_usage_perc{{engine="0"}} 0.25
vllm:kv_cache_usage_perc{{engine="1"}} 0.75
impala_traces{{engine="0",state="running"}} 4.0
impala_traces{{engine="1",state="running"}} 1.0
impala_traces{{engine="0",state="gap"}} 7.0
impala_held_turns{{engine="0"}} 2.0
impala_policy_on{{engine="0"}} 0.0
impala_identity_on{{engine="0"}} 1.0
impala_kv_host_size_bytes{{engine="0"}} {2 << 30}
impala_kv_host_used_bytes{{engine="0"}} {1 << 30}
impala_kv_nvme_errors_total{{engine="0"}} 3.0
nonsense
also{{nonsense}} x
"""


def test_ranks_are_added_up_and_trouble_is_named():
    found = live.view(1.0, HEALTH, pages(row("t1"), row("t2", "gap", 50)), metrics())
    assert found.traces == {"running": 5, "gap": 7, "ended": 0}
    assert (found.running, found.waiting, found.held, found.longest_wait_s) == (4, 2, 2, None)
    assert [(t.name, t.share, t.size_gib) for t in found.tiers] == [("HBM", 0.5, None), ("host", 0.5, 2.0)]
    assert found.trouble == ("policy is off: vLLM's own order", "NVMe errors: 3")
    assert found.working_set_tokens == 150


def test_running_traces_come_first_and_long_ones_before_short_ones():
    found = live.view(1.0, HEALTH, pages(row("a", "gap", 999), row("b", tokens=5), row("c", tokens=7)), "")
    assert [r["trace_id"] for r in found.trace_rows] == ["c", "b", "a"]
    assert (found.held, found.tiers, found.trouble) == (None, (), ())


def test_a_trace_that_changed_state_between_two_pages_is_shown_once():
    found = live.view(1.0, HEALTH, pages(row("a"), row("a")), "")
    assert len(found.trace_rows) == 1


def test_rates_are_of_the_time_between_two_looks():
    before = live.view(10.0, HEALTH, pages(), metrics())
    now = live.view(12.0, HEALTH, pages(), metrics(computed=80, hbm=90, external=30, output=25))
    found = live.rates(now, before)
    assert (found.over_s, found.prompt_tokens, found.output_tokens) == (2.0, 50.0, 10.0)
    assert found.hit_ratio == pytest.approx(0.8)
    assert found.by_source == {"local_compute": 0.2, "local_cache_hit": 0.6, "external_kv_transfer": 0.2}


def test_without_a_look_before_rates_are_since_the_start():
    found = live.rates(live.view(10.0, HEALTH, pages(), metrics()), None)
    assert (found.over_s, found.prompt_tokens, found.hit_ratio) == (None, 100.0, pytest.approx(0.4))


def test_a_server_that_began_anew_counts_from_its_start():
    before = live.view(10.0, HEALTH, pages(), metrics(computed=1000))
    found = live.rates(live.view(12.0, HEALTH, pages(), metrics()), before)
    assert (found.over_s, found.prompt_tokens) == (None, 100.0)


def test_no_prompt_gives_no_ratio():
    assert live.rates(live.view(1.0, HEALTH, pages(), ""), None).hit_ratio is None
