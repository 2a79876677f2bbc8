"""impala without an HTTP server: `LLM(...)`, `vllm run-batch`, and what vLLM says where plugins are filtered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from impala_vllm.replay import tiny_model
from impala_vllm.replay.server import free_port
from tests.e2e.conftest import ENVIRONMENT

PROMPTS = ["The scheduler hands out blocks of memory. " * 3, "Turn over every stone. " * 5]
VLLM = str(Path(sys.executable).parent / "vllm")

LLM_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], scheduler_cls="impala_vllm.Scheduler", max_model_len=2048, block_size=32, dtype=sys.argv[2],
          num_gpu_blocks_override=512, enforce_eager=True, max_num_seqs=16)
params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
outputs = [llm.generate(prompt, params)[0] for prompt in json.loads(sys.argv[3])]
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
observer = getattr(scheduler, "observer", None)
print(json.dumps({
    "scheduler": f"{type(scheduler).__module__}.{type(scheduler).__name__}",
    "links": observer.num_links if observer else None,
    "tokens": [output.outputs[0].token_ids for output in outputs],
}))
"""


def run(arguments, **environment):
    every = {**os.environ, **ENVIRONMENT, **environment}
    return subprocess.run(arguments, env=every, capture_output=True, text=True, timeout=420)


def generate(model, config, tmp_path):
    file = tmp_path / "impala.yaml"
    file.write_text(config)
    arguments = [sys.executable, "-c", LLM_SCRIPT, model, tiny_model.CPU_DTYPE, json.dumps(PROMPTS)]
    done = run(arguments, IMPALA_CONFIG=str(file), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_llm_with_the_scheduler_named_observes_and_off_is_stock(model, stock, tmp_path):
    expected = [stock.complete(prompt)["choices"][0]["token_ids"] for prompt in PROMPTS]
    observed = generate(model, "mode: observe\n", tmp_path)
    assert observed == {
        "scheduler": "impala_vllm.adapters.vllm.scheduler.ObservedSync",
        "links": len(PROMPTS),
        "tokens": expected,
    }
    off = generate(model, 'mode: "off"\n', tmp_path)
    assert off == {"scheduler": "vllm.v1.core.sched.scheduler.Scheduler", "links": None, "tokens": expected}


def test_run_batch_takes_the_flags(model, stock, tmp_path):
    body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 8, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    size = ["--max-model-len", "2048", "--block-size", "32", "--num-gpu-blocks-override", "512", "--enforce-eager"]
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--served-model-name", "tiny"]
    ours = ["--scheduler", "impala", "--impala-mode", "enforce", "--impala-host-gib", "1"]
    done = run([VLLM, "run-batch", *files, "--model", model, "--dtype", tiny_model.CPU_DTYPE, *size, *ours])
    assert done.returncode == 0, done.stderr[-2000:]
    (answer,) = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = stock.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == expected
    said = done.stdout + done.stderr
    assert "mode = enforce (--impala-mode)" in said
    assert "host tier of" in said
    assert said.count("impala watches vLLM's Scheduler") == 1


@pytest.mark.parametrize(
    ("model_named", "version", "environment", "says"),
    [
        (None, "0.31.0", {}, "impala: vLLM 0.31.0 is not supported"),
        ("no/such-model", None, {}, "impala: model no/such-model: cannot be loaded"),
        # impala is not even loaded then: the best there is, and what docs/compatibility.md explains.
        (None, None, {"VLLM_PLUGINS": "other"}, "ambiguous option: --scheduler"),
    ],
)
def test_where_it_cannot_work_vllm_leaves_with_2_and_no_traceback(model, model_named, version, environment, says):
    disguise = f"import vllm.version; vllm.version.__version__ = {version!r}; " if version else ""
    script = f"{disguise}from vllm.entrypoints.cli.main import main; main()"
    port = str(free_port())
    arguments = [sys.executable, "-c", script, "serve", model_named or model, "--scheduler", "impala", "--port", port]
    done = run(arguments, **environment)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
