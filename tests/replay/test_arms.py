"""Command lines of the arms: the same but for the one thing each is about."""

from pathlib import Path

import pytest
import yaml

from impala_vllm.config import load
from impala_vllm.replay.arms import ARMS, Arm, Machine, command, pick, server

MACHINE = Machine(Path("/models/tiny"), dtype="float32", hbm_blocks=100, unbounded_blocks=9000)


def after(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_arms_differ_in_what_they_are_about_only() -> None:
    stock = command(ARMS["stock"], MACHINE)
    assert "--scheduler" not in stock
    assert command(ARMS["impala-observe"], MACHINE) == [*stock, "--scheduler", "impala", "--impala-mode", "observe"]
    unbounded = command(ARMS["unbounded"], MACHINE)
    assert [a for a, b in zip(stock, unbounded, strict=True) if a != b] == ["100"]


def test_an_arm_forces_replay_and_reports_cached_tokens() -> None:
    for arm in ARMS.values():
        line = command(arm, MACHINE)
        assert after(line, "--logits-processors").endswith(":ForcedReplay")
        assert "--enable-prompt-tokens-details" in line
        assert after(line, "--block-size") == "32"
        assert after(line, "--host") == "127.0.0.1"


def test_a_server_gets_a_port_of_its_own_and_the_arms_environment(tmp_path: Path) -> None:
    arm = Arm("x", "x", env={"X": "1"})
    one, other = server(arm, MACHINE, tmp_path), server(arm, MACHINE, tmp_path)
    assert one.port != other.port
    assert str(one.port) in one.command


def test_arms_of_the_switched_engine_differ_in_their_salts_only() -> None:
    one, other = ARMS["switched-stock"], ARMS["switched-impala"]
    assert command(one, MACHINE) == command(other, MACHINE)
    assert one.engine == other.engine is not None
    assert (one.salt_mark, other.salt_mark) == ("-stock", "")


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("impala-identity", {"rank", "admission", "retention"}),
        ("impala-rank", {"admission", "retention"}),
        ("impala-rank-admission", {"retention"}),
    ],
)
def test_an_ablation_is_enforcing_without_some_policies(name: str, off: set[str], tmp_path: Path) -> None:
    assert command(ARMS[name], MACHINE) == command(ARMS["impala-enforce"], MACHINE)
    line = server(ARMS[name], MACHINE, tmp_path / "logs").command
    path = tmp_path / "logs" / f"{name}.yaml"
    assert after(line, "--impala-config") == str(path)
    assert yaml.safe_load(path.read_text()) == {policy: {"enabled": False} for policy in off}


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("no-gate", {"planner": {"gate_writes": False}}),
        ("no-choice", {"planner": {"choose_loads": False}}),
        ("no-admission", {"admission": {"enabled": False}}),
        ("no-retention", {"retention": {"enabled": False}}),
        ("no-supersession", {"retention": {"supersede": False}}),
    ],
)
def test_an_ablation_of_the_tiers_is_known_to_the_configuration(name: str, switches: object, tmp_path: Path) -> None:
    arm = ARMS[f"impala-tiers-{name}"]
    assert arm.config == switches
    assert (arm.tiers, arm.has_nvme) == ("impala", True)
    load(None, {f"{table}.{key}": ("arm", v) for table, pairs in arm.config.items() for key, v in pairs.items()})


def test_an_arm_without_configuration_writes_none(tmp_path: Path) -> None:
    assert "--impala-config" not in server(ARMS["impala-enforce"], MACHINE, tmp_path).command
    assert not list(tmp_path.iterdir())


def test_a_machine_describes_what_was_added_to_it() -> None:
    assert (
        Machine(Path("m"), dtype="float32", extra_args=("--max-num-seqs", "16"))
        .describe()
        .endswith("context 8,192 --max-num-seqs 16")
    )


def test_an_unknown_arm_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown arm 'fast'; known: stock, unbounded"):
        pick("stock,fast")
