"""Timings: those that are shipped say where they come from; bad files are one line."""

import pytest

from impala_vllm.config import ConfigError
from impala_vllm.sim import timing
from tests.sim.scenes import TIMING


@pytest.mark.parametrize("name", timing.names())
def test_a_shipped_timing_is_named_as_its_file_and_says_where_it_comes_from(name):
    found = timing.load(name)
    assert found.name == name
    assert len(found.provenance) > 40
    assert found.step_s([(512, 0)], 0, 0) < found.step_s([(512, 4096)], 0, 0) < found.step_s([(1024, 4096)], 4, 400)


def test_the_default_is_shipped():
    assert timing.DEFAULT in timing.names()


def test_a_step_is_fixed_plus_prompts_plus_decodes():
    assert TIMING.step_s([(8, 0), (4, 100)], 2, 50) == 1.0 + 6.0 + 0.5


def test_attention_makes_late_tokens_dearer():
    engine = timing.load("cpu-26m")
    assert engine.prefill_s(100, 1000) == pytest.approx(100 * (2.7e-4 + 1.5e-7 * 1050))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [", "not a timing"),
        ("name: x", "missing required field"),
        ("- 1", "Expected `object`"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text, problem):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        timing.load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("fixed_s", "-1.0"), ("fixed_s", "0"), ("decode_s_per_context", ".inf")])
def test_a_figure_that_cannot_be_is_refused(tmp_path, field, value):
    text = "\n".join(
        f"{key}: {value if key == field else getattr(TIMING, key)}"
        for key in TIMING.__struct_fields__
        if key != "source" and getattr(TIMING, key) is not None
    )
    path = tmp_path / "t.yaml"
    path.write_text(f"{text}\nsource: derived\n")
    with pytest.raises(ConfigError, match=field):
        timing.load(str(path))


def test_a_name_that_is_neither_shipped_nor_a_file_is_answered_with_those_that_are():
    with pytest.raises(ConfigError, match="cpu-26m"):
        timing.load("no-such-engine")
