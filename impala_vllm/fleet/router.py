"""One turn's way: whose it is, where it goes, what is noted while it runs. No HTTP here.

Everything runs on one thread but `Prompts`, which is asked in workers. Nothing is kept of a prompt but hashes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from typing import NamedTuple

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.core.identity.index import BrokenChain
from impala_vllm.core.types import Arrival, Finish, Link, Namespace, Outcome, RequestId
from impala_vllm.fleet.echo import Echo
from impala_vllm.fleet.hashing import Prompt
from impala_vllm.fleet.homes import Home, Homes
from impala_vllm.fleet.index import Depths
from impala_vllm.fleet.lapses import Lapses, Prefill
from impala_vllm.fleet.places import BlockKey, Replica
from impala_vllm.fleet.residency import Expectation, Residency
from impala_vllm.fleet.scoring import Decision, Load, Policy, Question, Terms


class Turn(NamedTuple):
    """A request, as far as routing goes."""

    namespace: Namespace
    prompt: Prompt | None
    """None: its hashes are not known."""
    block_tokens: int
    num_tokens: int
    """Of the prompt; a guess by its bytes where it could not be tokenised."""
    session_id: str | None = None
    parent_session_id: str | None = None
    shows_first_token: bool = True
    """Its answer begins with its first token: it is streamed, and nothing is sent before."""


@dataclass(slots=True)
class Ticket:
    """A turn on its way to a replica. Ends exactly once."""

    request_id: RequestId
    turn: Turn
    link: Link
    decision: Decision
    prefill: Prefill
    was_idle: bool
    expected: Expectation | None
    started_s: float
    has_answered: bool = field(default=False)
    has_ended: bool = field(default=False)


class Plan(NamedTuple):
    """An answer without consequences, with its terms."""

    decision: Decision | None
    terms: Mapping[Replica, Terms]


_NOTHING: Sequence[BlockKey] = ()
MAX_GUESSED_S = 60.0
"""What was advised of a prompt that is known by its bytes only counts for no longer."""


class Router:
    """Decides where turns go. `loads` is the fleet's, and changes as servers come and go."""

    def __init__(self, loads: Mapping[Replica, Load], residency: Residency, policy: Policy, lot: Random) -> None:
        self.loads = loads
        self.residency = residency
        self.policy = policy
        self.homes = Homes(loads)
        self._lot = lot
        self._identity = self._new_identity()
        self._ids = count(1)
        self._lapses = Lapses()
        self.num_broken_chains = 0
        self._echo = Echo(lambda replica, key: bool(residency.known.holds(replica, key)))

    def start(
        self, turn: Turn, among: Mapping[Replica, Load], without: Collection[Replica], now: float
    ) -> Ticket | None:
        """Send the turn to the best of `among`; None where none is open. `without`: tried in vain already."""
        self._lapses.look(now)
        request_id = RequestId(f"r{next(self._ids)}")
        keys = turn.prompt.keys if turn.prompt is not None else _NOTHING
        link = self._arrive(
            Arrival(request_id, keys, turn.num_tokens, turn.namespace, turn.session_id, turn.parent_session_id), now
        )
        question = self._question(turn, link)
        open_ones = {replica: load for replica, load in among.items() if replica not in without} if without else among
        decision = self.policy.choose(question, open_ones, self._lot)
        if decision is None:
            self._identity.finish(Finish(request_id, keys, turn.num_tokens, Outcome.ERROR), now)
            return None
        replica, load = decision.replica, self.loads[decision.replica]
        prefill = Prefill(load, self.policy.cost.prefill_s(turn.num_tokens, decision.cached_tokens))
        expected = self._expect(turn, decision, now)
        if turn.prompt is not None:
            self.homes.put(link.trace_id, Home(replica, turn.num_tokens, keys[0] if len(keys) else None, now))
        elif turn.session_id is not None:
            self.homes.put(link.trace_id, Home(replica, turn.num_tokens, None, now))
        was_idle = not load.num_running and not load.elsewhere.num_running
        ticket = Ticket(request_id, turn, link, decision, prefill, was_idle, expected, now)
        if not turn.shows_first_token:
            waits_s = load.pending_s + load.elsewhere.pending_s
            self._lapses.add(now + waits_s + prefill.seconds, prefill)
        load.start(prefill.seconds)
        return ticket

    def answer(self, ticket: Ticket, now: float) -> None:
        """The first byte of an answer has come; of a refusal it is not to be told: `end` is enough."""
        if ticket.has_answered:
            return
        ticket.has_answered = True
        ticket.prefill.end()
        computed = ticket.turn.num_tokens - ticket.decision.cached_tokens
        if ticket.was_idle and ticket.turn.prompt is not None and ticket.turn.shows_first_token:
            mean_context = ticket.decision.cached_tokens + computed / 2
            self.policy.cost.observe(now - ticket.started_s, computed, mean_context)

    def end(self, ticket: Ticket, outcome: Outcome, has_events: bool, now: float) -> None:
        """It is over, one way or the other. Later calls change nothing."""
        if ticket.has_ended:
            return
        ticket.has_ended = True
        ticket.prefill.end()
        ticket.prefill.load.end()
        if ticket.expected is not None:
            self.residency.settle(ticket.expected, has_events or outcome is Outcome.ERROR)
        keys = ticket.turn.prompt.keys if ticket.turn.prompt is not None else _NOTHING
        if has_events and len(keys) and ticket.has_answered and outcome is not Outcome.ERROR:
            self._echo.expect(ticket.decision.replica, keys[0], now)
        self._identity.finish(Finish(ticket.request_id, keys, ticket.turn.num_tokens, outcome), now)

    def plan(self, turn: Turn, among: Mapping[Replica, Load]) -> Plan:
        """What `start` would decide, term by term; nothing is noted. The trace is found by its session id only.

        Without one it may be an old trace, so it is not kept from its prefix by those that live beside it.
        """
        home = self._home_of_session(turn)
        question = self._question(turn, None)._replace(home=home, settles=turn.session_id is not None)
        decision = self.policy.choose(question, among, self._lot)
        return Plan(decision, self.policy.explain(question, among))

    def advise(self, turn: Turn, among: Mapping[Replica, Load], now: float) -> Plan:
        """A plan for somebody who sends the turn there, and tells neither of its beginning nor of its end.

        It counts as under way for as long as computing it should take: those who ask at once do not herd, and where
        prices are wrong the counts do not grow without end.
        """
        self._lapses.look(now)
        plan = self.plan(turn, among)
        if plan.decision is not None:
            load = self.loads[plan.decision.replica]
            prefill = Prefill(load, self.policy.cost.prefill_s(turn.num_tokens, plan.decision.cached_tokens))
            expected = self._expect(turn, plan.decision, now)
            lasts_s = prefill.seconds if turn.prompt is not None else min(prefill.seconds, MAX_GUESSED_S)
            self._lapses.add(now + lasts_s, prefill, partial(self._lapse, load, expected))
            load.start(prefill.seconds)
        return plan

    def leave(self, replica: Replica) -> None:
        """The replica is gone, or has lost its KV."""
        self.residency.forget(replica)
        self.homes.leave(replica)
        self._echo.forget(replica)

    def tick(self, now: float) -> None:
        """Let go of what is over. Call every second or so."""
        self._lapses.look(now)
        self._identity.tick(now)
        self.homes.expire(now)
        self.residency.expire(now)
        self._echo.look(now)

    def _expect(self, turn: Turn, decision: Decision, now: float) -> Expectation | None:
        """What its replica is about to compute of it."""
        num_known = decision.cached_tokens // turn.block_tokens
        if turn.prompt is None or num_known >= len(turn.prompt.keys):
            return None
        return self.residency.expect(decision.replica, turn.prompt.keys, num_known, now)

    def _lapse(self, load: Load, expected: Expectation | None) -> None:
        """What was advised should be over, if it was done at all: only events tell."""
        load.end()
        if expected is not None:
            self.residency.settle(expected, has_events=True)

    def _arrive(self, arrival: Arrival, now: float) -> Link:
        try:
            return self._identity.arrive(arrival, now)
        except BrokenChain:  # two prefixes with one 64-bit key: nothing in the index can be trusted from here on
            self.num_broken_chains += 1
            self._identity = self._new_identity()
            self.homes = Homes(self.loads)
            for load in self.loads.values():
                load.live_tokens = load.num_traces = 0
            return self._identity.arrive(arrival, now)

    def _new_identity(self) -> Identity:
        identity = Identity(IdentityConfig())
        identity.on_forget = lambda trace_id: self.homes.forget(trace_id)
        return identity

    def _question(self, turn: Turn, link: Link | None) -> Question:
        depths: Mapping[Replica, Depths] | None = None
        sharing = 1
        if turn.prompt is not None:
            keys = turn.prompt.keys
            depths = self.residency.depths(keys)
            sharing = 1 + self.homes.num_sharing(keys[0]) if len(keys) else 1
        home = self.homes.get(link.trace_id) if link is not None else None
        place = home.replica if home is not None else None
        return Question(turn.num_tokens, turn.block_tokens, depths, place, sharing, 1 + self.homes.num_live)

    def _home_of_session(self, turn: Turn) -> Replica | None:
        if turn.session_id is None:
            return None
        for trace in self._identity.traces:
            if trace.session_id == turn.session_id and trace.namespace == turn.namespace:
                home = self.homes.get(trace.trace_id)
                return home.replica if home is not None else None
        return None
