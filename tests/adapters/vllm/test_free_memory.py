"""What a container's limits leave, on trees like the kernel's."""

from pathlib import Path

import pytest

from impala_vllm.adapters.vllm.free_memory import below_limits

MIB = 1 << 20
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000


def v2(folder: Path, limit: int | str, used: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {inactive_file}\nactive_file 3\n")


def v1(folder: Path, limit: int, used: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {inactive_file}\n")


def test_a_container_has_what_its_own_limit_leaves(tmp_path: Path) -> None:
    v2(tmp_path, 100 * MIB, 40 * MIB)
    assert below_limits(tmp_path, "0::/\n") == 60 * MIB


def test_what_the_page_cache_can_give_back_is_free(tmp_path: Path) -> None:
    v2(tmp_path, 100 * MIB, 95 * MIB, inactive_file=90 * MIB)
    assert below_limits(tmp_path, "0::/\n") == 95 * MIB


def test_the_tightest_of_the_limits_around_a_process_counts(tmp_path: Path) -> None:
    v2(tmp_path / "pods" / "one", "max", 5 * MIB)
    v2(tmp_path / "pods", 80 * MIB, 50 * MIB)
    v2(tmp_path / "pods" / "one" / "main", 60 * MIB, 5 * MIB)
    assert below_limits(tmp_path, "0::/pods/one/main\n") == 30 * MIB


@pytest.mark.parametrize("path", ["/kubepods/pod-1/abc", "/../../abc"])
def test_a_path_of_the_hosts_that_is_not_there_falls_back_on_the_root(tmp_path: Path, path: str) -> None:
    v2(tmp_path, 100 * MIB, 40 * MIB)
    assert below_limits(tmp_path, f"0::{path}\n") == 60 * MIB


def test_without_a_limit_there_is_none(tmp_path: Path) -> None:
    v2(tmp_path, "max", 40 * MIB)
    assert below_limits(tmp_path, "0::/\n") is None
    assert below_limits(tmp_path / "nowhere", "0::/\n") is None
    assert below_limits(tmp_path, "") is None


def test_a_process_beyond_its_limit_has_nothing(tmp_path: Path) -> None:
    v2(tmp_path, 100 * MIB, 140 * MIB)
    assert below_limits(tmp_path, "0::/\n") == 0


def test_version_1_is_read_below_its_own_mount(tmp_path: Path) -> None:
    v1(tmp_path / "memory", UNLIMITED_V1, 0)
    v1(tmp_path / "memory" / "docker" / "abc", 100 * MIB, 70 * MIB, inactive_file=20 * MIB)
    assert below_limits(tmp_path, "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n") == 50 * MIB
    assert below_limits(tmp_path, "4:cpu,memory:/docker/abc\n") == 50 * MIB


def test_both_versions_may_limit_a_process(tmp_path: Path) -> None:
    v1(tmp_path / "memory" / "a", 100 * MIB, 10 * MIB)
    v2(tmp_path / "unified" / "b", 40 * MIB, 20 * MIB)
    assert below_limits(tmp_path, "4:memory:/a\n0::/b\n") == 20 * MIB
