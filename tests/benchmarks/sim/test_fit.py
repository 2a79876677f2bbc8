"""A timing fitted to what an engine was measured to do."""

from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("numpy")

from benchmarks.sim import fit
from benchmarks.sim.fit import Sample

TRUTH = (0.008, 0.02, 3e-4, 1e-7, 2e-3, 2e-7)


def took(row: list[float], truth: tuple[float, ...] = TRUTH) -> float:
    return sum(a * b for a, b in zip(row, truth, strict=True))


def samples(truth: tuple[float, ...] = TRUTH, noise: float = 0.0) -> list[Sample]:
    prompts = [Sample.of_prompt(n, took(Sample.of_prompt(n, 1.0).row(), truth)) for n in fit.PROMPTS]
    batches = [Sample.of_batch(b, n, took(Sample.of_batch(b, n, 1.0).row(), truth)) for b, n in fit.BATCHES]
    made = [*prompts, *batches]
    return [Sample(s.seconds * (1 + noise * (-1) ** i), *s.row()) for i, s in enumerate(made)]


def test_what_an_engine_costs_is_found_again():
    assert fit.fitted(samples()) == pytest.approx(TRUTH, rel=1e-6)
    assert max(map(abs, fit.errors(samples(), TRUTH))) < 1e-9


def test_nothing_costs_less_than_nothing_however_noisy_it_is():
    free = (0.0, 0.02, 3e-4, 0.0, 2e-3, 0.0)
    found = fit.fitted(samples(free, noise=0.05))
    assert min(found) >= 0
    assert found[2] == pytest.approx(3e-4, rel=0.2)


def test_a_long_prompt_takes_a_step_for_each_chunk():
    assert Sample.of_prompt(fit.CHUNK, 1.0).steps == 1
    assert Sample.of_prompt(fit.CHUNK + 1, 1.0).steps == 2
    with_two = took(Sample.of_prompt(fit.CHUNK + 1, 1.0).row()) - took(Sample.of_prompt(fit.CHUNK, 1.0).row())
    assert with_two == pytest.approx(TRUTH[1] + TRUTH[2] + TRUTH[3] * fit.CHUNK, rel=1e-3)


def test_what_cannot_be_measured_or_written_is_one_line_before_anything_starts(tmp_path: Path):
    from impala_vllm.replay import tiny_model

    model = tmp_path / "none"
    said = CliRunner().invoke(fit.main, ["--model", str(model)])
    assert (said.exit_code, said.output.count("\n")) == (2, 1)
    assert str(model) in said.output
    said = CliRunner().invoke(
        fit.main, ["--model", str(tiny_model.build("1m")), "--out", str(tmp_path / "no" / "t.yaml")]
    )
    assert (said.exit_code, said.output) == (2, f"error: --out {tmp_path}/no/t.yaml: no such folder; make it first\n")
