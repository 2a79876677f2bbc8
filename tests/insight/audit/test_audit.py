"""What the audit says of small sessions in which one thing changes."""

import json
from random import Random
from typing import Any

import msgspec
import pytest
import zstandard

from impala_vllm.insight.audit import Cause, Finding, audit
from impala_vllm.insight.audit.prompts import parts
from impala_vllm.workload import WorkloadError
from tests.insight.audit.logs import SYSTEM, TOOLS, findings, only, session


def test_a_session_that_only_grows_has_nothing_to_find(tmp_path):
    assert findings(tmp_path, session()) == []


def test_a_retry_and_a_step_back_have_nothing_to_find(tmp_path):
    requests = session()
    again = [{**r, "request_id": f"again {r['request_id']}"} for r in (requests[2], requests[4])]
    assert findings(tmp_path, [*requests, *again]) == []


@pytest.mark.parametrize(
    ("stamps", "cause"),
    [
        (["2026-11-24T10:00:00Z", "2026-11-24T10:00:07Z"], Cause.TIMESTAMP),
        (["Tuesday, Nov 24, 2026 at 9:59 PM", "Wednesday, Nov 25, 2026 at 12:01 AM"], Cause.TIMESTAMP),
        (["1795514400", "1795514460"], Cause.TIMESTAMP),
        (["id 5e0c1f7e-3c1b-4a53-9d53-2f3b8f0f6a11", "id 0b7c4e88-91d2-4d70-8a10-7c1fd2f0b9aa"], Cause.NONCE),
        (["request 9 of 50", "request 10 of 50"], Cause.COUNTER),
    ],
)
def test_what_changes_at_the_head_of_the_system_prompt_is_named(tmp_path, stamps, cause):
    requests = session(2)
    for request, stamp in zip(requests, stamps, strict=True):
        request["messages"][0]["content"] = f"{stamp}\n{SYSTEM}"
    found = findings(tmp_path, requests)
    assert only(found) == ("system", cause)
    text = sum(len(m.get("content") or "") for m in requests[0]["messages"])
    assert found[0].lost_tokens == pytest.approx(text / 4, rel=0.1)  # all there was but the tools


def test_tools_in_another_order_differ_from_tools_that_changed_and_from_keys_that_moved(tmp_path):
    requests = session(2)
    requests[1]["tools"] = TOOLS[::-1]
    assert only(findings(tmp_path, requests)) == ("tools", Cause.TOOLS_REORDERED)
    requests[1]["tools"] = TOOLS[:2]
    assert only(findings(tmp_path, requests)) == ("tools", Cause.TOOLS_CHANGED)
    requests[1]["tools"] = None
    assert only(findings(tmp_path, requests)) == ("system", Cause.TOOLS_CHANGED)
    requests[0]["tools"], requests[1]["tools"] = None, TOOLS
    assert only(findings(tmp_path, requests)) == ("tools", Cause.TOOLS_CHANGED)
    requests[0]["tools"] = TOOLS
    requests[1]["tools"] = [dict(reversed(tool.items())) for tool in TOOLS]
    assert only(findings(tmp_path, requests)) == ("tools", Cause.JSON_KEYS)


def test_keys_of_a_tool_call_that_moved_are_named_and_keys_of_a_message_do_not_count(tmp_path):
    requests = session(3)
    messages = requests[2]["messages"]
    requests[2]["messages"] = [dict(reversed(message.items())) for message in messages]
    assert findings(tmp_path, requests) == []
    function = messages[2]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(dict(reversed(json.loads(function["arguments"]).items())))
    requests[2]["messages"] = messages
    assert only(findings(tmp_path, requests)) == ("message 3", Cause.JSON_KEYS)


@pytest.mark.parametrize("change", [lambda text: text + " ", lambda text: text.replace(" ", "  ")])
def test_white_space_is_named(tmp_path, change):
    requests = session(3)
    requests[2]["messages"][1]["content"] = change(requests[2]["messages"][1]["content"])
    assert only(findings(tmp_path, requests)) == ("message 2", Cause.WHITESPACE)


def test_a_text_and_a_list_of_that_text_are_the_same(tmp_path):
    requests = session(3)
    message = requests[2]["messages"][1]
    message["content"] = [{"type": "text", "text": message["content"]}]
    assert findings(tmp_path, requests) == []


def test_reasoning_that_is_gone_from_history_is_a_rendering(tmp_path):
    requests = session(3)
    requests[1]["messages"].insert(1, {"role": "assistant", "content": "Hello there.", "reasoning_content": "greet"})
    requests[2]["messages"].insert(1, {"role": "assistant", "content": "Hello there."})
    assert only(findings(tmp_path, requests[1:])) == ("message 2", Cause.RERENDERED)


def test_history_that_is_trimmed_summed_up_edited_or_added_to_is_told_apart(tmp_path):
    def with_last(change: Any) -> list[dict[str, Any]]:
        requests = session(5)
        change(requests[4]["messages"])
        return requests

    def trim(messages: list[Any]) -> None:
        del messages[1:4]

    def sum_up(messages: list[Any]) -> None:
        messages[1:8] = [{"role": "user", "content": "Summary of the conversation so far: paris was asked for."}]

    def edit(messages: list[Any]) -> None:
        messages[4]["content"] += " but in business class, please"

    def add(messages: list[Any]) -> None:
        messages.insert(4, {"role": "user", "content": "Reminder: never book without asking."})

    assert only(findings(tmp_path, with_last(trim))) == ("message 2", Cause.TRIMMED)
    assert only(findings(tmp_path, with_last(sum_up))) == ("message 2", Cause.COMPACTED)
    assert only(findings(tmp_path, with_last(edit))) == ("message 5", Cause.EDITED)
    assert only(findings(tmp_path, with_last(add))) == ("message 5", Cause.INSERTED)


def test_a_cut_is_one_finding_though_a_later_result_is_read_again(tmp_path):
    requests = session(5)
    result = "a line of the file that was read\n" * 40
    read = {"role": "user", "content": result}
    for request in requests[2:]:
        request["messages"][3]["content"] = result[::-1]
        request["messages"][6] = read
    for request in requests[3:]:
        request["messages"][3]["content"] = result[:-80:-1]
    requests[4]["messages"].append(read)
    found = findings(tmp_path, requests[2:])
    assert only(found) == ("message 4", Cause.TRIMMED)
    assert found[0].turn == 2


def test_an_image_that_changed_is_told_from_text_that_did(tmp_path):
    requests = session(2)
    for request, data in zip(requests, ("AAAA", "BBBB"), strict=True):
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        request["messages"].insert(1, {"role": "user", "content": [{"type": "text", "text": "Look:"}, image]})
    assert only(findings(tmp_path, requests)) == ("message 2", Cause.IMAGE)


@pytest.mark.parametrize(("field", "cause"), [("model", Cause.MODEL), ("cache_salt", Cause.SALT)])
def test_another_model_or_salt_loses_the_whole_prompt_once(tmp_path, field, cause):
    requests = session(4)
    for i, request in enumerate(requests):
        request[field] = "a" if i < 2 else "b"
    found = findings(tmp_path, requests)
    assert only(found) == ("whole prompt", cause)
    assert found[0].turn == 3


def test_a_helper_with_its_own_prompt_between_turns_is_no_divergence(tmp_path):
    requests = session(4)
    title = {"role": "system", "content": "Name this conversation in at most five words, without quotes."}
    helper = {"request_id": "h", "session_id": "s", "messages": [title, {"role": "user", "content": "Paris trip"}]}
    assert findings(tmp_path, [requests[0], requests[1], helper, *requests[2:]]) == []


def test_sessions_without_an_id_are_recognised(tmp_path):
    requests = session(4)
    for request in requests:
        del request["session_id"]
    requests[3]["messages"][4]["content"] += "   "
    assert only(findings(tmp_path, requests)) == ("message 5", Cause.WHITESPACE)


def test_texts_are_kept_only_where_asked_for(tmp_path):
    requests = session(2)
    requests[1]["messages"][0]["content"] = SYSTEM.replace("flights", "trains")
    assert findings(tmp_path, requests)[0].now is None
    found = findings(tmp_path, requests, show_text=True)[0]
    assert found.was is not None
    assert found.now is not None
    assert "flights" in found.was
    assert "trains" in found.now


def test_tools_nobody_called_are_listed_with_what_carried_them(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in session(5)))
    report = audit(log)
    assert {tool.name for tool in report.never_called()} == {"book", "cancel"}
    assert all(tool.num_requests == 5 for tool in report.tools)
    assert next(tool.num_calls for tool in report.tools if tool.name == "search") == 4


def test_corrupt_lines_are_skipped_and_counted(tmp_path):
    log = tmp_path / "log.jsonl"
    good = [json.dumps(r) for r in session(3)]
    log.write_text("\n".join(["{", good[0], '{"messages": [1]}', good[1], "\x00\xff", good[2]]))
    report = audit(log)
    assert (report.requests, report.skipped, report.totals) == (3, 3, {})
    assert report.first_error is not None
    assert "log.jsonl:1:" in report.first_error


def test_a_damaged_file_is_skipped_and_what_stands_before_the_damage_counts(tmp_path):
    lines = "".join(json.dumps(r) + "\n" for r in session(40)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.zst").write_bytes(b"no archive at all")
    (tmp_path / "c.bin").write_bytes(Random(2).randbytes(4000))
    (tmp_path / "d.jsonl").write_bytes(b"")
    whole = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
    whole[-2] ^= 255  # the checksum: what was decompressed is there, and then it fails
    (tmp_path / "e.jsonl.zst").write_bytes(whole)
    report = audit(tmp_path)
    assert report.requests >= 40
    assert (report.skipped, report.totals) == (4, {})


def test_nesting_without_end_is_a_corrupt_line(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    good = [json.dumps(r) for r in session(2)]
    bad = [deep, f'{{"messages": [{{"role": "user", "content": {deep}}}]}}', f'{{"messages": [], "tools": {deep}}}']
    (tmp_path / "log.jsonl").write_text("\n".join([bad[0], good[0], *bad[1:], good[1]]))
    report = audit(tmp_path / "log.jsonl")
    assert (report.requests, report.skipped, report.totals) == (2, 3, {})


def test_a_log_whose_writer_changed_is_read_on(tmp_path):
    step = {"timestamp": 1, "input": "user: What is there to see in Paris, and when?", "session_id": "t"}
    lines = [json.dumps(r) for r in (*session(2), step, {"version": 3, "prompt": "hi"}, *session(4)[2:])]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    report = audit(tmp_path / "log.jsonl")
    assert (report.requests, report.sessions, report.skipped, report.totals) == (5, 2, 1, {})


@pytest.mark.parametrize("content", ["", "{\n", '{"what": 1}\n', "[]"])
def test_a_log_without_a_usable_request_is_refused(tmp_path, content):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    with pytest.raises(WorkloadError):
        audit(log)


def test_a_rendered_prompt_may_go_on_anywhere_in_its_last_part(tmp_path):
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    plain = "Read this issue and mend it.\n\nIt fails on Mondays, which nobody here understands, so look closely.\n\nok"
    for first, more in ((text, "So.<|im_end|>\n<|im_start|>user\nAnd?"), (plain, " then\n\nmore"), (plain, "\n\nso")):
        log = tmp_path / "log.jsonl"
        steps = [{"timestamp": i, "input": t} for i, t in enumerate((first, first + more, first, first + more + "!"))]
        log.write_text("".join(json.dumps(step) + "\n" for step in steps))
        report = audit(log)
        assert (report.requests, report.totals) == (4, {})
        assert "".join(part for _, part in parts(first + more)) == first + more


def test_block_ids_say_where_and_how_much(tmp_path):
    chains = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7], [1, 2, 13, 14, 15, 16, 17, 18]]
    log = tmp_path / "log.jsonl"
    with log.open("wb") as out:
        for i, ids in enumerate(chains):
            out.write(msgspec.json.encode({"request_id": str(i), "arrival_s": i, "block_size": 16, "block_ids": ids,
                                           "input_tokens": 16 * len(ids), "session_id": "s"}) + b"\n")  # fmt: skip
    found: list[Finding] = []
    report = audit(log, on_finding=found.append)
    assert not report.estimated
    assert only(found) == ("block 3", Cause.BLOCKS)
    assert found[0].lost_tokens == 5 * 16


def test_another_agent_that_reads_the_same_has_a_different_head(tmp_path):
    requests = session(3)
    judge = {"role": "system", "content": "Judge whether what follows obeys our rules, and answer with one number."}
    read = {**requests[2], "request_id": "judge", "tools": None, "messages": [judge, *requests[2]["messages"][2:]]}
    for request in requests:
        request["tools"] = None
    assert only(findings(tmp_path, [*requests, read])) == ("system", Cause.HEAD)
