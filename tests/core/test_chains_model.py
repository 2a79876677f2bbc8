"""Random turns in a tier, against a naive model."""

import random
from collections.abc import Iterable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.core.allocator import Key
from impala_vllm.core.chains import MAX_CHAINS, STEM_SHARE, Chains
from impala_vllm.core.types import TraceId
from tests.core.tier import LARGE, keys


class Naive:
    """The same rules, told by a list of lists that is searched and rebuilt for everything."""

    def __init__(self, max_stems: int, worth: dict[TraceId, int]) -> None:
        self.max_stems, self.worth = max_stems, worth
        self.nobodys: list[Key] = []
        self.stems: list[Key] = []
        self.chains: dict[TraceId, list[list[Key]]] = {}

    def here(self) -> list[Key]:
        return [*self.nobodys, *self.stems, *(k for chains in self.chains.values() for c in chains for k in c)]

    def owner(self, key: Key) -> TraceId | None:
        return next((t for t, chains in self.chains.items() if any(key in c for c in chains)), None)

    def drop(self, gone: Iterable[Key]) -> None:
        lists = [self.nobodys, self.stems, *(c for chains in self.chains.values() for c in chains)]
        for held in lists:
            held[:] = [key for key in held if key not in gone]

    def add(self, fresh: Sequence[Key], trace_id: TraceId | None) -> None:
        if trace_id is not None and self.chains.get(trace_id):
            self.chains[trace_id][-1] += fresh
        else:
            self.nobodys += fresh[::-1]

    def use(self, trace_id: TraceId, used: Sequence[Key], stem: int) -> None:
        mine = self.chains.setdefault(trace_id, [])
        own = next((k for k in used[stem:] if self.owner(k) == trace_id), None)
        before = next((c for c in mine if own in c), None)
        here = [k for k in used if k in self.here()]
        old = set(before or ())
        shared = [
            k
            for k in here
            if used.index(k) < stem or k in self.stems or (k not in old and self.owner(k) not in (None, trace_id))
        ]
        chain = [k for k in here if k not in shared]
        superseded = [k for k in before or () if k not in here]
        self.drop([*here, *superseded])
        self.stems += shared[::-1]
        self.nobodys += superseded[::-1]
        mine[:] = [c for c in mine if c and c is not before]
        mine.append(chain)
        if len(mine) > MAX_CHAINS:
            self.nobodys += mine.pop(0)[::-1]

    def release(self, trace_id: TraceId) -> None:
        for chain in self.chains.pop(trace_id, []):
            self.nobodys += chain[::-1]

    def order(self, spared: Sequence[TraceId], limit: TraceId | None, last: Sequence[TraceId] = ()) -> list[Key]:
        surplus = max(0, len(self.stems) - self.max_stems)
        cheap = sorted(self.chains, key=lambda t: (t in last, self.worth[t]))
        if limit is not None:
            cheap = [t for t in cheap if self.worth[t] < self.worth[limit]]
        chains = [c for t in cheap if t not in spared for c in self.chains[t]]
        stems = self.stems[surplus:] if limit is None else []
        return [*self.stems[:surplus], *self.nobodys, *(k for c in chains for k in c[::-1]), *stems]


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_random_turns_agree_with_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    traces = [TraceId(name) for name in "abcd"]
    worth = {t: i for i, t in enumerate(rng.sample(traces, len(traces)))}
    num_chunks = rng.choice([6, 20])
    chains = Chains(num_chunks, worth.__getitem__)
    naive = Naive(int(STEM_SHARE * num_chunks), worth)
    histories = [keys("s", rng.randrange(3)) for _ in range(5)]
    for _ in range(50):
        verb = rng.choices(["turn", "drop", "release", "touch", "add"], [6, 2, 1, 1, 1])[0]
        trace_id = rng.choice(traces)
        if verb == "turn":
            number = rng.randrange(len(histories))
            cut = rng.randrange(len(histories[number]) + 1) if rng.random() < 0.2 else len(histories[number])
            used = histories[number] = [*histories[number][:cut], *keys(f"{rng.random()}-", rng.randrange(3))]
            stem = rng.choice([0, 0, rng.randrange(len(used) + 1)])
            surely_here = chains.use(trace_id, used, stem)
            naive.use(trace_id, used, stem)
            assert set(used[surely_here.start : surely_here.stop]) <= set(naive.here())
            fresh = [key for key in used if key not in chains][: rng.randrange(6)]
            chains.add(fresh, trace_id)
            naive.add(fresh, trace_id)
        elif verb == "drop":
            gone = naive.order((), None)[: rng.randrange(6)]
            if rng.random() < 0.2:
                gone = rng.sample(naive.here(), min(2, len(naive.here())))  # what a disk lost
            chains.drop(gone)
            naive.drop(gone)
        elif verb == "release":
            chains.release(trace_id)
            naive.release(trace_id)
        elif verb == "touch":
            used = rng.choice(histories)
            chains.touch(used)
            touched = [key for key in used if key in naive.nobodys]
            naive.drop(touched)
            naive.nobodys += touched[::-1]
        else:
            fresh = [key for key in rng.choice(histories) if key not in chains]
            chains.add(fresh)
            naive.add(fresh, None)
        chains.check_invariants()
        assert len(chains) == len(naive.here())
        assert all(chains.trace_of(key) == naive.owner(key) for key in naive.here())
        spared = rng.sample(traces, rng.randrange(3))
        limit = rng.choice([None, *traces])
        last = rng.sample(traces, rng.randrange(3))
        assert chains.victims(LARGE, list, spared, limit, last) == naive.order(spared, limit, last)
