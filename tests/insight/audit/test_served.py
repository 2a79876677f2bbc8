"""What the server says was cached, against what a prompt could have found there."""

import pytest

from impala_vllm.insight.audit import Cause
from tests.insight.audit.logs import findings, only, report_of, session


def usage(prompt: int, cached: int) -> dict[str, object]:
    return {"prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": cached}}


def test_a_prompt_that_was_no_longer_cached_is_an_eviction(tmp_path):
    requests = session(3)
    for request, cached in zip(requests, (0, 0, 330), strict=True):
        request["usage"] = usage(400, cached)
    report = report_of(tmp_path, requests)
    assert (report.counted, report.served, report.prompt_tokens) == (3, 2, 1200)
    assert not report.estimated
    found = findings(tmp_path, requests)
    assert only(found) == ("whole prompt", Cause.EVICTED)
    assert found[0].turn == 2
    assert found[0].block == 1


def test_what_no_count_can_be_is_no_count(tmp_path):
    requests = session(5)
    for request, prompt in zip(requests, (-5, True, 1.5, "many", None), strict=True):
        request["usage"] = {"prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": prompt}}
    report = report_of(tmp_path, requests)
    assert (report.requests, report.counted, report.served, report.skipped) == (5, 0, 0, 0)


@pytest.mark.parametrize(
    ("cached", "cause"), [(48, None), (32, Cause.LAST_BLOCK), (16, Cause.EVICTED), (0, Cause.EVICTED)]
)
def test_a_log_of_block_ids_tells_a_dropped_block_from_an_eviction(tmp_path, cached, cause):
    chains = [[1, 2, 3], [1, 2, 3, 4]]
    records = [
        {"request_id": str(i), "arrival_s": i, "block_size": 16, "block_ids": ids, "input_tokens": 16 * len(ids),
         "session_id": "s", "cached_tokens": cached if i else 0}
        for i, ids in enumerate(chains)
    ]  # fmt: skip
    found = findings(tmp_path, records)
    assert [f.cause for f in found] == ([] if cause is None else [cause])
    assert sum(f.lost_tokens for f in found) == (48 - cached if cause else 0)
