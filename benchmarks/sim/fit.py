"""`python -m benchmarks.sim.fit --model DIR`: how long a real engine's steps take, as a timing of the simulator.

Prompts that come alone tell what prefill costs by depth, batches of cached prompts what a decoding request costs by its
context. The rest of a request's way (HTTP, tokens into text) is fitted apart and left out.
"""

import asyncio
import dataclasses
import itertools
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import record
from impala_vllm.replay import arms, tiny_model
from impala_vllm.replay.arms import Machine
from impala_vllm.replay.client import Answer, Client
from impala_vllm.replay.plan import PlannedTurn
from impala_vllm.replay.server import ServerError
from impala_vllm.replay.vocabulary import ModelError, Vocabulary
from impala_vllm.sim import timing

CHUNK = 2048
"""Most tokens a step."""
PROMPTS = (64, 256, 512, 1024, 2048, 4096, 6144)
BATCHES = tuple(itertools.product((1, 4, 8, 16), (256, 1024, 3072)))
"""How many decode together, and tokens of context of each."""
OUTPUT = 33
REPETITIONS = 3
LINKS = (12.0, 2.0)
"""Host and NVMe, times the prefill rate in the middle of a prompt of `RATE_AT` tokens."""
RATE_AT = 4096


@dataclass(frozen=True, slots=True)
class Sample:
    """What took `seconds`: so many requests, steps, prompt tokens, tokens before those, decodes, their context."""

    seconds: float
    requests: float
    steps: float
    tokens: float = 0.0
    depth: float = 0.0
    decodes: float = 0.0
    context: float = 0.0

    @classmethod
    def of_prompt(cls, num_tokens: int, seconds: float) -> "Sample":
        """One alone, to its first token."""
        return cls(seconds, 1, -(-num_tokens // CHUNK), num_tokens, num_tokens**2 / 2)

    @classmethod
    def of_batch(cls, num_requests: int, num_tokens: int, seconds: float) -> "Sample":
        """A step in which all decode, halfway through their outputs."""
        return cls(seconds, 0, 1, 0, 0, num_requests, num_requests * (num_tokens + OUTPUT / 2))

    def row(self) -> list[float]:
        return [self.requests, self.steps, self.tokens, self.depth, self.decodes, self.context]


def fitted(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Seconds for one more of each column of `Sample.row`, none below 0: least squares of relative errors."""
    seconds = np.array([s.seconds for s in samples])
    rows = np.array([s.row() for s in samples]) / seconds[:, None]
    best, least = np.zeros(rows.shape[1]), float("inf")
    for some in itertools.product((False, True), repeat=rows.shape[1]):
        columns = np.flatnonzero(some)
        if not len(columns):
            continue
        found = np.linalg.lstsq(rows[:, columns], np.ones(len(samples)), rcond=None)[0]
        off = float(np.sum((rows[:, columns] @ found - 1) ** 2))
        if (found >= 0).all() and off < least - 1e-12:
            best, least = np.zeros(rows.shape[1]), off
            best[columns] = found
    return tuple(float(x) for x in best)


def errors(samples: Iterable[Sample], found: Sequence[float]) -> list[float]:
    """By how much each is off, as a share of what was measured."""
    return [sum(a * b for a, b in zip(s.row(), found, strict=True)) / s.seconds - 1 for s in samples]


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Model directory; the 26 M one is built otherwise.")
@click.option("--name", default="mine", show_default=True, help="Of the timing.")
@click.option("--out", type=click.Path(path_type=Path), help="Where it goes; standard output otherwise.")
@click.option("--hbm-tokens", type=click.IntRange(min=64), default=12_288, show_default=True, help="Room for KV.")
def main(model: Path | None, name: str, out: Path | None, hbm_tokens: int) -> None:
    """Measure a stock engine, idle but for this, and fit a timing. Five minutes for a tiny model."""
    console, logs = Console(stderr=True), Path(tempfile.mkdtemp(prefix="impala-fit-"))
    try:
        machine = Machine(model or tiny_model.build("26m"), hbm_blocks=2000)
        words = Vocabulary.of_model(machine.model)
        if out is not None and not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: no such folder; make it first")
        machine = dataclasses.replace(machine, extra_args=("--max-num-batched-tokens", str(CHUNK)))
        with console.status("measuring"), arms.server(arms.ARMS["stock"], machine, logs) as engine:
            engine.wait_ready()
            samples = asyncio.run(_measured(engine.url, words))
    except (ServerError, ModelError, tiny_model.TinyModelError, ValueError) as e:
        click.echo(f"error: {e}", err=True)
        if not any(logs.iterdir()):
            logs.rmdir()
        sys.exit(2)
    shutil.rmtree(logs)
    found = fitted(samples)
    _show(samples, found, console)
    text = yaml.safe_dump(_described(name, machine, hbm_tokens, samples, found), sort_keys=False, width=120)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        timing.load(str(out))


async def _measured(url: str, words: Vocabulary) -> list[Sample]:
    samples: list[Sample] = []
    for repetition in range(-1, REPETITIONS):  # the first one warms up
        for num_tokens in PROMPTS:
            turn = _turn(words, f"prompt-{repetition}-{num_tokens}", num_tokens, 1)
            answer = (await _sent(url, [turn]))[0]
            samples.append(Sample.of_prompt(num_tokens, (answer.first_token_s or answer.end_s) - answer.start_s))
        for num_requests, num_tokens in BATCHES:
            keys = [f"batch-{repetition}-{num_requests}-{num_tokens}-{i}" for i in range(num_requests)]
            for key in keys:
                await _sent(url, [_turn(words, key, num_tokens, 1)])
            answers = await _sent(url, [_turn(words, key, num_tokens, OUTPUT) for key in keys])
            apart = fmean((a.end_s - (a.first_token_s or a.end_s)) / (OUTPUT - 1) for a in answers)
            samples.append(Sample.of_batch(num_requests, num_tokens, apart))
        if repetition < 0:
            samples.clear()
    return samples


def _turn(words: Vocabulary, key: str, num_tokens: int, num_output: int) -> PlannedTurn:
    return PlannedTurn(key, words.text(key, num_tokens), words.text(f"{key}/output", num_output), 0.0)


async def _sent(url: str, turns: Sequence[PlannedTurn]) -> list[Answer]:
    async with Client(url, "tiny", salt="fit") as client:
        sent = (client.send(turn, f"{turn.request_id}-{len(turn.output)}", "") for turn in turns)
        answers = await asyncio.gather(*sent)
    if failed := [a.error for a in answers if a.error]:
        raise ServerError(f"a request failed: {failed[0]}")
    return answers


def _show(samples: Sequence[Sample], found: Sequence[float], console: Console) -> None:
    """Each kind of sample once: what its repetitions took, and how far the fit is off them."""
    table = Table("prompt tokens", "decoding", "context", "milliseconds", "fit", title="measured and fitted")
    kinds: dict[tuple[float, ...], list[tuple[float, float]]] = {}
    for s, off in zip(samples, errors(samples, found), strict=True):
        kinds.setdefault((s.tokens, s.decodes, s.context), []).append((1000 * s.seconds, 100 * off))
    for (tokens, decodes, context), some in kinds.items():
        took, off = (
            ", ".join(f"{x:{form}}" for x in column)
            for column, form in zip(zip(*some, strict=True), (".0f", "+.0f"), strict=True)
        )
        table.add_row(f"{tokens:,.0f}", f"{decodes:.0f}", f"{context:,.0f}", took, f"{off} %")
    console.print(table)


def _described(
    name: str, machine: Machine, hbm_tokens: int, samples: Sequence[Sample], found: Sequence[float]
) -> dict[str, Any]:
    _, fixed, token, depth, decode, context = (float(f"{x:.2g}") for x in found)
    origin, per_token = record.origin(), machine.kv_bytes_per_token()
    host, nvme = (float(f"{times * per_token / (token + depth * RATE_AT / 2):.2g}") for times in LINKS)
    off = sorted(abs(x) for x in errors(samples, found))
    return {
        "name": name,
        "engine": f"{machine.model.name}, {machine.dtype}, {origin.machine}",
        "source": "fitted",
        "provenance": f"python -m benchmarks.sim.fit at commit {origin.commit[:12]}: {len(samples)} samples, half of "
        f"them off by less than {100 * off[len(off) // 2]:.0f} %, the worst by {100 * off[-1]:.0f} %. Links at GPU "
        f"ratios, not this machine's: host {LINKS[0]:g} times, NVMe {LINKS[1]:g} times the prefill rate in KV bytes.",
        "fixed_s": fixed,
        "prefill_s_per_token": token,
        "prefill_s_per_token_and_context": depth,
        "decode_s_per_request": decode,
        "decode_s_per_context": context,
        "kv_bytes_per_token": per_token,
        "host_bytes_per_s": host,
        "nvme_read_bytes_per_s": nvme,
        "nvme_write_bytes_per_s": nvme,
        "hbm_tokens": hbm_tokens,
    }


if __name__ == "__main__":
    main()
