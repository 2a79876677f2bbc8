"""What the router counts, for Prometheus. Labels are reasons, states and servers: never traces, tenants or hashes."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from impala_vllm.fleet.fleet import Fleet
from impala_vllm.fleet.proxy.bodies import Bodies
from impala_vllm.fleet.registry import Registry
from impala_vllm.fleet.router import Router, Ticket

_DECISION_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 2e-2)


class Metrics:
    """One router's, in a registry of its own."""

    def __init__(self, fleet: Fleet, router: Router, bodies: Bodies, shared: Registry | None = None) -> None:
        """`shared`: what several routers share, where they do."""
        self.registry = CollectorRegistry()
        of = self.registry
        self._turns = Counter(
            "impala_router_turns", "Turns sent to a server, by why it was chosen", ["reason"], registry=of
        )
        self._prompt = Counter("impala_router_prompt_tokens", "Prompt tokens routed", registry=of)
        self._cached = Counter(
            "impala_router_cached_tokens", "Of them, expected in reach of the server chosen", registry=of
        )
        self._unhashed = Counter("impala_router_unhashed_turns", "Turns whose hashes were not known", registry=of)
        self._seconds = Histogram(
            "impala_router_decision_seconds", "Time to decide", buckets=_DECISION_BUCKETS, registry=of
        )
        self.retries = Counter("impala_router_retries", "Turns tried on another server", registry=of)
        self.broken = Counter("impala_router_broken", "Upstream requests that failed", registry=of)
        self.refused = Counter("impala_router_refused", "Requests for which no server was open", registry=of)
        self.left = Counter("impala_router_left", "Clients that left before the end", registry=of)
        self.registry.register(_Gauges(fleet, router, bodies, shared))

    def decided(self, ticket: Ticket, seconds: float) -> None:
        """A turn was sent somewhere."""
        self._turns.labels(ticket.decision.reason.value).inc()
        self._prompt.inc(ticket.turn.num_tokens)
        self._cached.inc(ticket.decision.cached_tokens)
        self._seconds.observe(seconds)
        if ticket.turn.prompt is None:
            self._unhashed.inc()

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    """What is so now, read when it is asked for."""

    def __init__(self, fleet: Fleet, router: Router, bodies: Bodies, shared: Registry | None) -> None:
        self._fleet = fleet
        self._router = router
        self._bodies = bodies
        self._shared = shared

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        stats = self._fleet.index.stats()
        yield _gauge("impala_router_index_blocks", "Distinct blocks in the index", stats.num_blocks)
        yield _gauge("impala_router_index_copies", "Blocks in the index, over all servers and tiers", stats.num_copies)
        yield _gauge("impala_router_index_bytes", "Memory of the index, estimated", stats.num_bytes)
        yield _gauge("impala_router_live_traces", "Traces that may come back", self._router.homes.num_live)
        states = GaugeMetricFamily("impala_router_server_up", "1: new requests go there", labels=["server"])
        believed = GaugeMetricFamily("impala_router_server_hashes", "1: its hashes are used", labels=["server"])
        running = GaugeMetricFamily("impala_router_running", "Requests under way", labels=["server", "dp_rank"])
        tokens = GaugeMetricFamily("impala_router_live_tokens", "Of live traces", labels=["server", "dp_rank"])
        for server in list(self._fleet.servers.values()):
            states.add_metric([server.id], float(any(self._fleet.loads[r].is_open for r in server.replicas)))
            believed.add_metric([server.id], float(server.problem is None))
        for replica, load in list(self._fleet.loads.items()):
            running.add_metric([replica.server, str(replica.dp_rank)], load.num_running)
            tokens.add_metric([replica.server, str(replica.dp_rank)], load.live_tokens)
        yield from (states, believed, running, tokens)
        what = "Requests whose body was too large (413), too slow (408), or too much with others' (503)"
        refused = CounterMetricFamily("impala_router_refused_bodies", what, labels=["status"])
        for status in (408, 413, 503):
            refused.add_metric([str(status)], self._bodies.num_refused[status])
        yield refused
        if (shared := self._shared) is not None:
            yield _gauge("impala_router_registry_up", "1: Redis answers", float(shared.problem is None))
            yield _gauge("impala_router_registry_told", "Servers' ranks this router tells others of", shared.num_told)
            heard = len(shared.index.heard)
            yield _gauge("impala_router_registry_heard", "Servers' ranks known from other routers", heard)
            failures = CounterMetricFamily("impala_router_registry_failures", "Times that Redis did not answer")
            failures.add_metric([], shared.num_failures)
            yield failures


def _gauge(name: str, what: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, what)
    family.add_metric([], value)
    return family
