"""The configuration: where values come from, and how a bad one is refused."""

from pathlib import Path

import pytest

from impala_vllm.config import ConfigError, Mode, dump, load, restore


def test_flags_win_over_the_file_and_each_value_remembers_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "i.yaml"
    file.write_text("mode: enforce\nidentity: {max_traces: 7}\n")
    settings = load(file, {"mode": ("--impala-mode", "off")})
    assert settings.config.mode is Mode.OFF
    assert settings.config.identity.max_traces == 7
    assert f"identity.max_traces = 7 ({file})" in settings.describe()
    assert "mode = off (--impala-mode)" in settings.describe()
    assert "ledger.path = None (default)" in settings.describe()


def test_settings_survive_the_way_to_another_process(tmp_path: Path) -> None:
    file = tmp_path / "i.yaml"
    file.write_text("mode: off\nmetadata: {session_headers: [x-a, x-b]}\n")
    settings = load(file)
    assert restore(dump(settings)) == settings


@pytest.mark.parametrize("text", ["1e9", "1.0e9", "1.e9", "1.0e+9", "1000000000", "+1E9"])
def test_a_number_may_be_written_as_everybody_writes_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "i.yaml"
    file.write_text(f"tiers: {{nvme_read_bytes_per_s: {text}}}\n")
    assert load(file).config.tiers.nvme_read_bytes_per_s == 1e9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mod: observe", "unknown key mod; did you mean mode?"),
        ("mode: [a", r"i\.yaml:1: not valid YAML"),
        ("mode: 2026-13-45", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("- a", "the top level is a list"),
        ("mode: {a: b}", "choose one of off, observe, enforce"),
        ("identity:", "holds several keys"),
        ("identity: {max_traces: 0}", "must be above 0"),
        ("identity: {max_traces: 1.5}", "must be a whole number"),
        ("identity: {lease_s: .inf}", "must be above 0"),
        ("tiers: {host_gib: .nan}", "must be 0 or more"),
        ("tiers: {host_gib: e9}", "must be a number"),
        ("tiers: {nvme_gib: 1}", "has no directory"),
        ("tiers: {nvme_path: /x}", "has no size"),
        ("metadata: {session_headers: x-a}", "must be a list of texts"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "i.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        load(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)
