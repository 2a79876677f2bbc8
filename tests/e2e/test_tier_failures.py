"""Whatever becomes of the disk, answers are stock's: every failure of the NVMe tier, on a real engine.

One directory, through the lives of three servers and in the order of this file: another model fills it, ours takes it
over and is killed amid writes, the next one finds what is left. Its disk is then broken in every other way.
"""

import concurrent.futures
import contextlib
import fcntl
import http.client
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from impala_vllm.replay import tiny_model
from impala_vllm.replay.server import Server, ServerError
from impala_vllm.transfer.slab_header import HEADER_BYTES
from impala_vllm.transfer.slab_records import RECORD_BYTES
from tests.e2e.client import Client, until
from tests.e2e.conftest import BLOCK_SIZE, ENVIRONMENT, READY_S, command
from tests.e2e.test_enforce import NUM_AGENTS, NUM_BLOCKS, assert_left_well, live
from tests.e2e.test_tiers import CHUNK_BYTES, READ, WRITTEN, all_lives, gib
from tests.e2e.test_trouble import SABOTAGE

Answers = list[list[list[list[int]]]]
"""By agent, turn and sample: tokens."""
ROOT_CHUNKS = 2
"""What all agents of a salt begin with."""
SLAB = "impala-dp0.slab"
SEQUENCE = struct.Struct("<80xQ40x")
"""Where a record of the index says when it was written."""
USED, USABLE = "impala_kv_nvme_used_bytes{", "impala_kv_nvme_usable{"
ERRORS, WRONG = "impala_kv_nvme_errors_total{", "impala_kv_nvme_checksum_failures_total{"
PROMPT, EXTERNAL = "vllm:prompt_tokens_total{", "vllm:external_prefix_cache_hits_total{"
COMPUTED = 'vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"}'


class Place(NamedTuple):
    """What the servers of this file share."""

    folder: Path
    kv: Path
    """The NVMe directory."""
    orders: Path
    """Where `disk_orders` looks."""

    def serve(self, name: str, model: str, host_chunks: int) -> Server:
        """A tiered server that writes everything, loads whatever there is, and nothing before it is asked for."""
        config = self.folder / "impala.yaml"
        config.write_text("planner: {gate_writes: false, choose_loads: false}\n")
        ours = ["--scheduler", "impala", "--impala-config", str(config), "--num-gpu-blocks-override", str(NUM_BLOCKS)]
        tiers = ["--impala-host-gib", gib(host_chunks), "--impala-nvme-path", str(self.kv), "--impala-nvme-gib"]
        path = os.pathsep.join([str(SABOTAGE), os.environ.get("PYTHONPATH", "")])
        env = {**ENVIRONMENT, "PYTHONPATH": path, "IMPALA_DISK_ORDERS": str(self.orders)}
        return Server(name, command(model, *ours, *tiers, gib(2000)), self.folder / f"{name}.log", env)

    @contextlib.contextmanager
    def order(self, what: str) -> Iterator[None]:
        """Obeyed until the block is left."""
        (self.orders / what).touch()
        try:
            yield
        finally:
            (self.orders / what).unlink()


class Killed(NamedTuple):
    """What a server did in its life."""

    log: str
    salt: str
    answers: Answers
    num_chunks: int
    """What it wrote for them."""
    salt_amid: str
    """Of the traffic that it was killed in."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("failures")
    (folder / "orders").mkdir()
    return Place(folder, folder / "kv", folder / "orders")


@pytest.fixture(scope="module")
def strangers(place: Place) -> tuple[str, Answers]:
    """A salt, and the answers of another model whose KV fills the slab."""
    salt = uuid.uuid4().hex
    with place.serve("other", str(tiny_model.build("1m", seed=1)), 400) as server:
        server.wait_ready(READY_S)
        answers = all_lives(Client(server.url), salt)
        written(Client(server.url))
    return salt, answers


@pytest.fixture(scope="module")
def killed(place: Place, model: str, strangers: tuple[str, Answers]) -> Killed:
    """Our model, on the other one's slab; killed with the slab filled and more on its way there."""
    salt, salt_amid = strangers[0], uuid.uuid4().hex
    with place.serve("killed", model, 400) as server, concurrent.futures.ThreadPoolExecutor(NUM_AGENTS) as pool:
        server.wait_ready(READY_S)
        client = Client(server.url)
        answers = [live(client, agent, salt) for agent in range(NUM_AGENTS)]
        num_chunks = written(client) // CHUNK_BYTES
        for agent in range(NUM_AGENTS):
            pool.submit(live_while_it_lasts, client, agent, salt_amid)
        until(lambda: client.metric(WRITTEN) >= (num_chunks + 40) * CHUNK_BYTES)
        os.killpg(server._process.pid, signal.SIGKILL)
        server.stop()
    tear(place.kv / SLAB, num_chunks)
    return Killed(server.log.read_text(), salt, answers, num_chunks, salt_amid)


@pytest.fixture(scope="module")
def server(place: Place, model: str, killed: Killed) -> Iterator[Server]:
    """The same server again, on what is left."""
    with place.serve("again", model, 60) as server:
        server.wait_ready(READY_S)
        yield server


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url)


def written(client: Client) -> int:
    """Bytes on NVMe, once nothing is on its way there any more."""
    client.complete("one more", max_tokens=1)  # what is stored moves on with the engine's steps
    until(lambda: client.metric(USED) == client.metric(WRITTEN) > 0)
    return int(client.metric(WRITTEN))


def live_while_it_lasts(client: Client, agent: int, salt: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        live(client, agent, salt)


def tear(slab: Path, num_whole: int) -> None:
    """What a power cut may leave of everything written after the first `num_whole` chunks."""
    index = slab.with_suffix(".index")
    sequences = [sequence for (sequence,) in SEQUENCE.iter_unpack(index.read_bytes()[HEADER_BYTES:])]
    late = sorted((slot for slot, s in enumerate(sequences) if s > num_whole), key=sequences.__getitem__)
    with slab.open("r+b") as file:
        for slot in late[:-1:3]:
            file.seek(slot * CHUNK_BYTES + CHUNK_BYTES // 2)
            file.write(bytes(CHUNK_BYTES // 2))
    with index.open("r+b") as file:
        file.seek(HEADER_BYTES + late[-1] * RECORD_BYTES + 40)
        file.write(bytes(48))


def next_prompt(agent: int, turns: list[list[list[int]]]) -> list[int]:
    """What the agent of `live` would ask after its last turn."""
    prompt = [7] * 64 + [30 + agent] * (150 + 20 * agent)
    for turn, (tokens,) in enumerate(turns):
        prompt = [*prompt, *tokens, *[200 + 10 * agent + turn] * 40]
    return prompt


def answer(client: Client, prompt: list[int], salt: str) -> list[int]:
    return client.complete(prompt, max_tokens=6, cache_salt=salt)["choices"][0]["token_ids"]


def filled(client: Client, stock: Client, salt: str) -> Answers:
    """Stock's answers, after agents have got the same ones and left more KV than HBM and host hold."""
    expected = [live(stock, agent, salt) for agent in range(NUM_AGENTS)]
    assert all_lives(client, salt) == expected
    return expected


def metrics(client: Client, *names: str) -> dict[str, float]:
    return {name: client.metric(name) for name in names}


def test_kv_of_another_model_is_dropped_with_one_line(stock, strangers, killed):
    expected = [live(stock, agent, killed.salt) for agent in range(NUM_AGENTS)]
    assert strangers[1] != expected, "the models answer alike: this test would show nothing"
    assert killed.answers == expected
    lines = [line for line in killed.log.splitlines() if "starts empty" in line]
    assert len(lines) == 1
    assert lines[0].endswith(f"{SLAB} starts empty: it was written by another model, configuration or version")


def test_after_kill_9_nothing_is_computed_that_the_slab_holds(stock, killed, server, client):
    num_chunks, num_filled = re.search(
        r"NVMe tier of (\d+) chunks in \S+, (\d+) filled", server.log.read_text()
    ).groups()
    assert killed.num_chunks < int(num_filled) < int(num_chunks)
    before = metrics(client, PROMPT, COMPUTED, EXTERNAL, READ)
    prompts = [next_prompt(agent, killed.answers[agent]) for agent in range(NUM_AGENTS)]
    asked = [answer(client, prompt, killed.salt) for prompt in prompts]
    assert asked == [answer(stock, prompt, killed.salt) for prompt in prompts]

    num_tokens, held_tokens = sum(map(len, prompts)), killed.num_chunks * BLOCK_SIZE
    until(lambda: client.metric(PROMPT) == before[PROMPT] + num_tokens)
    after = metrics(client, COMPUTED, EXTERNAL, READ)
    shared_tokens = (NUM_AGENTS - 1) * ROOT_CHUNKS * BLOCK_SIZE
    assert after[READ] - before[READ] == killed.num_chunks * CHUNK_BYTES
    assert after[EXTERNAL] - before[EXTERNAL] == held_tokens
    assert after[COMPUTED] - before[COMPUTED] == num_tokens - held_tokens - shared_tokens
    assert held_tokens > 0.8 * (num_tokens - shared_tokens), "the slab held little: this test would show little"


def test_torn_writes_are_misses(stock, killed, server, client):
    assert "dropped 1 damaged records" in server.log.read_text()
    expected = [live(stock, agent, killed.salt_amid) for agent in range(NUM_AGENTS)]
    assert all_lives(client, killed.salt_amid) == expected
    assert client.metric(WRONG) > 0
    assert_left_well(client)


def test_flipped_bits_are_misses(stock, place, client, salt):
    expected, wrong = filled(client, stock, salt), client.metric(WRONG)
    with (place.kv / SLAB).open("r+b", buffering=0) as file:
        for offset in range(CHUNK_BYTES // 3, file.seek(0, os.SEEK_END), CHUNK_BYTES):
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 16]), offset)
    assert all_lives(client, salt) == expected
    assert client.metric(WRONG) > wrong
    assert_left_well(client)


def test_a_disk_that_takes_seconds_a_read_changes_no_answer(stock, place, client, salt):
    """It answers, so it does not pass for broken; and what comes late lands in a host that others use meanwhile."""
    until(lambda: client.metric(USABLE) == 1)
    lives, read = filled(client, stock, salt), client.metric(READ)
    prompts = [next_prompt(agent, lives[agent]) for agent in range(NUM_AGENTS)]
    expected = [answer(stock, prompt, salt) for prompt in prompts]
    with place.order("slow"), concurrent.futures.ThreadPoolExecutor(NUM_AGENTS) as pool:
        assert list(pool.map(lambda prompt: answer(client, prompt, salt), prompts)) == expected
        until(lambda: client.metric(READ) > read)  # else nothing was read: this test would show nothing
    assert client.metric(USABLE) == 1
    assert [answer(client, prompt, salt) for prompt in prompts] == expected
    assert_left_well(client)


def test_a_disk_that_hangs_is_not_waited_for_and_used_again_when_it_answers(stock, place, client, salt):
    until(lambda: client.metric(USABLE) == 1)
    expected, read = filled(client, stock, salt), client.metric(READ)
    with place.order("hang"):
        assert all_lives(client, salt) == expected
        assert (place.orders / "hung").exists(), "nothing was read: this test would show nothing"
        assert client.metric(READ) == read, "a read ended: an answer may have waited for it"
        until(lambda: client.metric(USABLE) == 0)
    until(lambda: client.metric(USABLE) == 1)
    assert all_lives(client, salt) == expected
    assert client.metric(READ) > read
    assert_left_well(client)


def test_a_slab_cut_off_is_a_miss(stock, place, client, salt):
    until(lambda: client.metric(USABLE) == 1)
    expected, errors = filled(client, stock, salt), client.metric(ERRORS)
    os.truncate(place.kv / SLAB, 0)
    assert all_lives(client, salt) == expected
    until(lambda: client.metric(ERRORS) > errors)
    until(lambda: client.metric(USABLE) == 1)
    assert_left_well(client)


def test_a_full_disk_takes_nothing_and_harms_nothing(stock, server, client, salt):
    """A slab has its room from the start; here the kernel refuses writes, as it does on a full disk to a cut file."""
    processes = [psutil.Process(server._process.pid), *psutil.Process(server._process.pid).children(recursive=True)]
    before = {p.pid: resource.prlimit(p.pid, resource.RLIMIT_FSIZE) for p in processes}
    until(lambda: client.metric(USABLE) == 1)
    errors = client.metric(ERRORS)
    try:
        for pid, (_, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, hard))
        expected = filled(client, stock, salt)
        until(lambda: client.metric(ERRORS) > errors)  # writes end in their own time
        assert all_lives(client, salt) == expected
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    until(lambda: client.metric(USABLE) == 1)
    on_disk = client.metric(WRITTEN)
    assert all_lives(client, salt) == expected
    until(lambda: client.metric(WRITTEN) > on_disk)
    assert_left_well(client)


def test_a_removed_directory_harms_nothing_until_the_server_ends(stock, place, client, salt):
    expected, before = filled(client, stock, salt), metrics(client, READ, ERRORS)
    shutil.rmtree(place.kv)
    assert all_lives(client, salt) == expected
    assert client.metric(READ) > before[READ]
    assert client.metric(ERRORS) == before[ERRORS]
    assert_left_well(client)


def test_a_thread_that_vanishes_leaves_a_server_without_nvme(stock, place, server, client, salt):
    """The last of this server's tests: nothing brings the tier back."""
    expected = filled(client, stock, salt)
    with place.order("vanish"):
        assert all_lives(client, salt) == expected
    assert client.metric(USABLE) == 0
    assert server.log.read_text().count("the NVMe tier failed and is switched off") == 1
    assert all_lives(client, salt) == expected
    health = client.json("/impala/health")
    assert health["status"] == "degraded"
    assert "NVMe" in "".join(health["reasons"])


@pytest.mark.parametrize(
    ("options", "says"),
    [("ro", "the file system is read-only; choose another directory"), ("size=1m", "GiB to spare, not 1; lower")],
)
def test_a_disk_that_cannot_hold_the_slab_is_one_line_and_exit_code_2(model, tmp_path, options, says):
    script = 'mount -t tmpfs -o "$0" none "$1" && shift && exec "$@"'
    mounted = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, options, str(tmp_path)]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount anything")
    flags = ["--scheduler", "impala", "--impala-nvme-path", str(tmp_path), "--impala-nvme-gib", "1"]
    serve = [part.replace("{port}", "0") for part in command(model, *flags)]
    ended = subprocess.run([*mounted, *serve], capture_output=True, text=True, timeout=READY_S)
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("impala: ")]
    assert str(tmp_path) in line
    assert says in line
    assert "Traceback" not in ended.stderr


def test_a_slab_in_use_ends_the_second_server_with_one_line(place, model, tmp_path):
    (tmp_path / SLAB).touch()
    with (tmp_path / SLAB).open() as file, place._replace(kv=tmp_path).serve("second", model, 60) as server:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ServerError, match="exited with 1 "):
            server.wait_ready(READY_S)
    lines = [line for line in server.log.read_text().splitlines() if SLAB in line]
    assert len(lines) == 1, "a traceback says it again"
    assert (
        f"impala: {tmp_path / SLAB} is in use by another process: give every server a directory of its own" in lines[0]
    )
