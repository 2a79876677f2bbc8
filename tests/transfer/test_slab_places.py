"""Where no slab can be: errors that say what to do, and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from impala_vllm.transfer.slab import SlabError
from tests.transfer.slabs import SLOT_BYTES, opened


def test_a_budget_below_one_slot_is_an_error_that_names_the_least(tmp_path: Path):
    with pytest.raises(SlabError, match="raise it to") as caught:
        opened(tmp_path / "x", num_bytes=SLOT_BYTES)
    least = int(str(caught.value).split("raise it to ")[1].split()[0])
    assert not (tmp_path / "x").exists()
    slab = opened(tmp_path / "x", num_bytes=least)
    assert slab.num_slots == 1
    slab.close()


def test_a_disk_without_room_is_an_error_and_is_left_as_it_was(tmp_path: Path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(SlabError, match=r"No space.*free some space, lower the NVMe budget") as caught:
        opened(tmp_path, num_bytes=free + (1 << 40), slot_bytes=64 << 20)
    assert "\n" not in str(caught.value)
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())


def test_a_real_full_file_system_is_an_error(tmp_path: Path):
    program = (
        "import sys; from impala_vllm.transfer import slab\n"
        "slab._check_room = lambda fd, num_bytes: None  # as if others took the room in between\n"
        f"try: slab.Slab.open(sys.argv[1], 8 << 20, {SLOT_BYTES}, 'a')\n"
        "except slab.SlabError as error: print(error)\n"
    )
    mount = f'mount -t tmpfs -o size=2m none "{tmp_path}" || exit 77; exec "$@"'
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("no file system can be mounted here")
    assert "No space left on device; free some space" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("file", "not a directory"),
        ("file/below", "a part of the path is a file"),
        ("/proc/impala", "choose another directory"),
        ("link", "symbolic link"),
        ("taken", "a directory has the file's name"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line_with_advice(tmp_path: Path, where: str, what: str):
    (tmp_path / "file").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "impala-0.slab").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "taken" / "impala-0.slab").mkdir(parents=True)
    with pytest.raises(SlabError, match=what) as caught:
        opened(tmp_path / where)
    assert "\n" not in str(caught.value)
    assert where in str(caught.value)
    assert not (tmp_path / "elsewhere").exists()
