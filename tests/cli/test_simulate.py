"""`impala simulate` from the outside: figures, files, exit codes."""

import json
from pathlib import Path

import pytest

from impala_vllm.cli.main import main
from impala_vllm.sim.policies import KINDS

SESSIONS = Path(__file__).parents[1] / "data" / "sessions.weka.jsonl.zst"
SMALL = ("--sessions", "4", "--load", "2")
FIGURES = {
    "stall_mean_s", "stall_p95_s", "jct_mean_s", "jct_p50_s", "jct_p95_s", "makespan_s", "tasks_per_hour", "hit_ratio",
    "recomputed_tokens", "resume_ttft_p50_s", "resume_ttft_p95_s", "bytes_moved", "max_hold_s",
}  # fmt: skip


def run(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["simulate", *map(str, argv)])
    return int(stop.value.code or 0)


def test_the_json_is_that_of_the_contract_and_the_same_twice(tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    for out in (first, second):
        assert run(SESSIONS, *SMALL, "--seed", "3", "--json", out) == 0
    assert first.read_bytes() == second.read_bytes()
    found = json.loads(first.read_text())
    assert set(found) == {"workload", "config", "policies"}
    assert list(found["policies"]) == ["stock", "impala", "unbounded"]
    assert all(set(figures) >= FIGURES for figures in found["policies"].values())
    assert found["workload"]["tasks"] == 4
    assert found["config"]["assumptions"]
    assert found["policies"]["unbounded"]["recomputed_tokens"] == 0
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_table_says_that_it_is_simulated_and_what_was_assumed(capsys):
    assert run(SESSIONS, *SMALL) == 0
    out = capsys.readouterr().out
    assert "Simulated, not measured" in out
    assert all(name in out for name in ("stock", "impala", "unbounded", "Assumed:", "h100-llama-3.1-8b"))


def test_json_on_standard_output_is_nothing_but_json(capsys):
    assert run(SESSIONS, *SMALL, "--policies", "stock", "--json", "-") == 0
    assert list(json.loads(capsys.readouterr().out)["policies"]) == ["stock"]


def test_all_policies_serve_the_same_turns(tmp_path, capsys):
    out = tmp_path / "all.json"
    assert run(SESSIONS, *SMALL, "--policies", "all", "--json", out) == 0
    assert list(json.loads(out.read_text())["policies"]) == list(KINDS)


def test_tiers_move_bytes_and_save_computing(tmp_path, capsys):
    found = {}
    for tokens in ("0", "4000000"):
        out = tmp_path / f"{tokens}.json"
        assert run(SESSIONS, *SMALL, "--host-tokens", tokens, "--policies", "stock", "--json", out) == 0
        found[tokens] = json.loads(out.read_text())["policies"]["stock"]
    assert found["0"]["bytes_moved"] == 0 < found["4000000"]["bytes_moved"]
    assert found["0"]["recomputed_tokens"] > found["4000000"]["recomputed_tokens"]


def test_a_router_is_chosen_by_name_and_makes_a_difference(tmp_path, capsys):
    found = {}
    for router in ("sticky", "round-robin"):
        out = tmp_path / f"{router}.json"
        argv = (SESSIONS, *SMALL, "--replicas", "2", "--policies", "stock", "--router", router, "--json", out)
        assert run(*argv) == 0
        found[router] = json.loads(out.read_text())
        assert found[router]["config"]["router"] == router
    hits = {router: figures["policies"]["stock"]["hit_ratio"] for router, figures in found.items()}
    assert hits["sticky"] > hits["round-robin"]


def test_how_few_replicas_would_do_is_in_the_table_and_in_the_json(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run(SESSIONS, *SMALL, "--replicas", "2", "--policies", "stock,impala", "--fewest", "--json", out) == 0
    found = json.loads(out.read_text())["policies"]
    assert "fewest_replicas" not in found["stock"]
    assert found["impala"]["fewest_replicas"] in (1, 2, None)
    assert "stock on 2 replicas" in " ".join(capsys.readouterr().out.split())


def test_a_trace_holds_every_turn_of_every_policy(tmp_path, capsys):
    out, figures = tmp_path / "trace.json", tmp_path / "f.json"
    assert run(SESSIONS, *SMALL, "--policies", "stock,impala", "--chrome-trace", out, "--json", figures) == 0
    events = json.loads(out.read_text())["traceEvents"]
    turns = json.loads(figures.read_text())["workload"]["turns"]
    for process in (1, 2):
        assert sum(e["name"] == "answer" and e["pid"] == process for e in events) == turns
    assert any(e["name"] == "prefill" for e in events)
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["no-such-file"], "no-such-file"),
        ([SESSIONS, "--sessions", "0"], "--sessions"),
        ([SESSIONS, "--load", "0"], "--load"),
        ([SESSIONS, "--load", "inf"], "--load"),
        ([SESSIONS, "--load", "1e-320"], "--load"),
        ([SESSIONS, "--replicas", "0"], "--replicas"),
        ([SESSIONS, "--replicas", "2", "--router", "dice"], "--router"),
        ([SESSIONS, "--fewest"], "--fewest"),
        ([SESSIONS, "--replicas", "2", "--policies", "impala", "--fewest"], "--fewest"),
        ([SESSIONS, "--hbm-tokens", "1"], "--hbm-tokens"),
        ([SESSIONS, "--host-tokens", "-1"], "--host-tokens"),
        ([SESSIONS, "--nvme-tokens", "1000000"], "--host-tokens"),
        ([SESSIONS, "--host-tokens", "10"], "holds no block"),
        ([SESSIONS, "--host-tokens", "1000000", "--nvme-tokens", "10"], "holds no block"),
        ([SESSIONS, "--html", "-", "--json", "-"], "its own file"),
        ([SESSIONS, "--policies", "best"], "choose from"),
        ([SESSIONS, "--timing", "abacus"], "abacus"),
        ([SESSIONS, "--json", "no-such-folder/out.json"], "cannot write there"),
        ([SESSIONS, "--html", "no-such-folder/out.html"], "cannot write there"),
        ([SESSIONS, "--html", SESSIONS], "that is the log itself"),
        ([SESSIONS, "--format", "mooncake"], "mend or remove that line"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, problem, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err
    assert captured.err.count("\n") == 1


def test_the_log_is_not_overwritten(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"x")
    assert run(log, "--json", log) == 2
    assert log.read_bytes() == b"x"


def test_a_page_answers_the_question(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert run(SESSIONS, *SMALL, "--replicas", "2", "--html", out) == 0
    assert "What would impala save on 2 replicas with sessions.weka.jsonl.zst?" in out.read_text()
    assert "Simulated, not measured" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_a_log_without_session_ids_says_how_many_were_recognised(tmp_path, capsys):
    log = tmp_path / "proxy.jsonl"
    lines = [
        {"request_id": f"r{i}", "arrival_s": 3.0 * i, "finish_s": 3.0 * i + 1, "block_size": 16,
         "input_tokens": n * 160, "output_tokens": 8, "block_ids": list(range(1000 * (i % 2), 1000 * (i % 2) + 10 * n))}
        for i in range(6)
        for n in [i // 2 + 1]
    ]  # fmt: skip
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.json"
    assert run(log, "--json", out) == 0
    assert "Recognised 2 sessions in 6 requests" in " ".join(capsys.readouterr().out.split())
    about = json.loads(out.read_text())["workload"]
    assert (about["tasks"], about["recognised_sessions"], about["unnamed_requests"]) == (2, 2, 6)


def test_arrivals_without_prompts_are_requests_of_their_own(tmp_path, capsys):
    log = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:15:{46 + i}.6805900,{300 + i},{20 + i}" for i in range(5)]
    log.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    assert run(log) == 0
    assert "Recognised 5 sessions in 5 requests" in " ".join(capsys.readouterr().out.split())
