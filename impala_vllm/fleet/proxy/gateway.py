"""Everything behind the router's routes, started and ended together."""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from impala_vllm.config import MetadataConfig
from impala_vllm.core.cost import CostConfig, StepCost
from impala_vllm.fleet.addresses import Address
from impala_vllm.fleet.asking import AskingConfig
from impala_vllm.fleet.fleet import Fleet
from impala_vllm.fleet.index import IndexConfig, MaskIndex
from impala_vllm.fleet.proxy.bodies import Bodies, BodyConfig
from impala_vllm.fleet.proxy.forward import Forward
from impala_vllm.fleet.proxy.metrics import Metrics
from impala_vllm.fleet.proxy.reading import Reader
from impala_vllm.fleet.proxy.stored import Stored, StoredRoutes
from impala_vllm.fleet.registry import Registry, RegistryConfig, SharedIndex
from impala_vllm.fleet.residency import Residency
from impala_vllm.fleet.router import Router
from impala_vllm.fleet.scoring import Policy, ScoringConfig

logger = logging.getLogger("impala.fleet")


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """What `impala router` is told."""

    workers: tuple[Address, ...]
    workers_file: Path | None = None
    tokenizer: str | None = None
    server_key: str | None = None
    admin_key: str | None = None
    explains: bool = False
    drain_s: float = 600.0
    """How long a removed server may finish what it runs."""
    registry: str | None = None
    """redis://..., shared with other routers; None: this one is alone."""
    index: IndexConfig = field(default_factory=IndexConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    """Of prefill, until it has been measured."""
    sharing: RegistryConfig = field(default_factory=RegistryConfig)
    asking: AskingConfig = field(default_factory=AskingConfig)
    bodies: BodyConfig = field(default_factory=BodyConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)


class Gateway:
    """Everything behind the routes; use as an async context manager."""

    def __init__(self, options: RouterOptions) -> None:
        """Raises RegistryError."""
        self.options = options
        local = MaskIndex(options.index)
        shared = SharedIndex(local) if options.registry is not None else None
        self.fleet = Fleet(shared or local, options.tokenizer, options.server_key, options.asking)
        residency = Residency(self.fleet.index, options.index)
        policy = Policy(options.scoring, StepCost(options.cost))
        self.router = Router(self.fleet.loads, residency, policy, Random())
        self.fleet.on_lost = self.router.leave
        self.registry: Registry | None = None
        if shared is not None and options.registry is not None:
            self.registry = Registry(options.registry, shared, self.fleet.sources, self.fleet.loads, options.sharing)
            self.fleet.is_told = shared.heard.__contains__
        self.bodies = Bodies(options.bodies)
        self.metrics = Metrics(self.fleet, self.router, self.bodies, self.registry)
        self.reader = Reader(self.fleet, options.metadata)
        stored = Stored()
        self.stored = StoredRoutes(self.fleet, stored, self.bodies)
        self.forward = Forward(
            self.fleet, self.router, self.reader, self.bodies, stored, self.metrics, options.explains
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Gateway":
        await self.fleet.__aenter__()
        for address in self.options.workers:
            self.fleet.add(address)
        self._tasks.append(asyncio.create_task(self._tick(), name="router tick"))
        if self.registry is not None:
            self._tasks.append(asyncio.create_task(self.registry.run(), name="registry"))
        if self.options.workers_file is not None:
            self._tasks.append(asyncio.create_task(self.fleet.follow_file(self.options.workers_file)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fleet.__aexit__()
        self.reader.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                self.router.tick(asyncio.get_running_loop().time())
            except Exception:  # routing goes on without the clean-up; the next second tries again
                logger.exception("clean-up failed")
