"""The loads of the study: what is shared in a log stays shared, and what is not does not become so."""

from random import Random

from benchmarks.sim import loads
from benchmarks.sim.loads import BLOCK, Logs, labelling, mixed, window
from impala_vllm.sim.recognised import recognise
from impala_vllm.sim.sessions import Session, Turn, Workload
from impala_vllm.workload import Turn as Recorded


def request(number: int, blocks: tuple[int, ...], session_id: str | None = None) -> Recorded:
    return Recorded(f"r{number}", float(number), None, blocks, BLOCK, len(blocks) * BLOCK + 1, 8, session_id=session_id)


def conversations(count: int) -> Workload:
    """Two requests each, the second a continuation of the first, 100 requests later; ids count up from zero."""
    made: list[Recorded] = []
    for i in range(count):
        first = 8 * i
        made += [request(2 * i, tuple(range(first, first + 4))), request(2 * i + 201, tuple(range(first, first + 8)))]
    made.sort(key=lambda t: t.arrival_s)
    return loads._merged(recognise(made).turns)


def keys(load: Workload) -> set[int]:
    return {key for turn in load.turns() for key in turn.keys}


def test_blocks_of_different_logs_are_different_in_a_mix():
    turn = Turn("a0", (-1, 0, 1, 2), 4 * BLOCK, 8)
    parts = [Workload(BLOCK, (Session(name, (turn,)),)) for name in "ab"]
    made = mixed(parts, Random(0))
    mine = {s.session_id: set(s.turns[0].keys) for s in made.sessions}
    assert not mine["a"] & mine["b"]
    assert len(keys(made)) == 8


def test_the_mix_of_the_study_shares_no_more_than_its_parts():
    agents = Workload(BLOCK, tuple(Session(f"s{i}", (Turn(f"s{i}.0", (1, 2, 3 + i), 1600, 8),)) for i in range(9)))
    made = Logs(agents, conversations(200)).make("mix", 9, 2, seed=1)
    sizes = {"s": 0, "j": 0, "r": 0}
    found: dict[str, set[int]] = {name: set() for name in sizes}
    for session in made.sessions:
        sizes[session.session_id[0]] += len(session.turns)
        found[session.session_id[0]].update(*(t.keys for t in session.turns))
    assert sizes == {"s": 3, "j": 30, "r": 30}
    assert sum(map(len, found.values())) == len(keys(made))


def test_tasks_of_a_mix_stay_in_the_order_of_their_part():
    parts = [labelling(20, Random(0)), window(conversations(50), 40, Random(0))]
    made = mixed(parts, Random(3)).roots()
    for part in parts:
        names = {s.session_id for s in part.roots()}
        assert [s.session_id for s in made if s.session_id in names] == [s.session_id for s in part.roots()]
    assert [s.session_id for s in made] != [s.session_id for part in parts for s in part.roots()]


def test_requests_are_sessions_in_a_row_with_all_that_follows():
    log = conversations(300)
    made = window(log, 40, Random(5))
    assert made.has_one_clock, "they come as they were recorded"
    assert [len(s.turns) for s in made.sessions] == [2] * 20
    names = [s.session_id for s in log.sessions]
    first = names.index(made.sessions[0].session_id)
    assert [s.session_id for s in made.sessions] == names[first : first + 20]
    assert made.new_tokens() < 0.7 * sum(t.prompt_tokens for t in made.turns())
    assert window(log, 40, Random(5)) == made
    assert window(log, 40, Random(6)) != made


def test_a_window_never_ends_before_it_is_full():
    log = conversations(25)
    assert all(window(log, 40, Random(seed)).num_turns() == 40 for seed in range(20))


def test_a_log_shorter_than_the_window_is_taken_whole():
    assert window(conversations(3), 40, Random(0)).num_turns() == 6


def test_blocks_of_a_log_are_merged_to_those_of_the_study():
    small = [Recorded("r0", 0.0, None, tuple(range(16)), 64, 1100, 8)]
    made = loads._merged(small)
    assert (made.block_size, made.sessions[0].turns[0].keys[:2]) == (loads.BLOCK, (7, 15))
