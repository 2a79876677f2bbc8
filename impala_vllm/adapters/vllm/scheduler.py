"""The scheduler vLLM is given: vLLM's own, watched by an `Observer`.

`Scheduler` is what `scheduler_cls` names. Calling it gives an instance of the class that vLLM
itself would have taken for the final configuration, synchronous or asynchronous, with the hooks on.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from impala_vllm.adapters.vllm import choice, tool_markers
from impala_vllm.adapters.vllm.bookkeeper import Bookkeeper
from impala_vllm.adapters.vllm.enforcer import Enforcer
from impala_vllm.adapters.vllm.observer import Observer
from impala_vllm.adapters.vllm.snapshot import install_snapshot
from impala_vllm.adapters.vllm.tiers.policy import tier_manager
from impala_vllm.adapters.vllm.weight_changes import install_watch
from impala_vllm.config import Mode
from impala_vllm.core.identity import Identity
from impala_vllm.core.traces import Trace
from impala_vllm.core.types import Link, TraceId

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.impala")

_NOBODY: frozenset[str] = frozenset()


class Scheduler:
    """Builds the observed scheduler for a finished configuration; stock vLLM's in mode off."""

    def __new__(cls, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Any:
        is_async = bool(vllm_config.scheduler_config.async_scheduling)
        settings = choice.of(vllm_config)
        install_snapshot()
        if vllm_config.diffusion_config is not None:
            logger.warning("impala: diffusion models keep vLLM's own scheduler; nothing is observed")
            return _diffusion(is_async)(vllm_config, *args, **kwargs)
        if settings.config.mode is Mode.OFF:
            return (AsyncScheduler if is_async else SyncScheduler)(vllm_config, *args, **kwargs)
        identity = Identity(settings.config.identity)
        markers = tool_markers.read(vllm_config.model_config.tokenizer)
        if settings.config.mode is Mode.ENFORCE:
            scheduler = (EnforcedAsync if is_async else EnforcedSync)(vllm_config, *args, **kwargs)
            scheduler.enforcer = Enforcer(scheduler, settings.config, markers)
            scheduler.enforcer.traces = identity.traces
            install_watch()
        else:
            scheduler = (ObservedAsync if is_async else ObservedSync)(vllm_config, *args, **kwargs)
        scheduler.observer = Observer(identity, markers)
        scheduler.bookkeeper = Bookkeeper.of(scheduler, settings.config, lambda: scheduler.observer.clock())
        identity.on_forget = scheduler.forget
        if isinstance(scheduler, _Enforced):
            scheduler.observer.on_switch_off = scheduler.forget_all
        logger.info(
            "impala watches vLLM's %s (async scheduling %s), so the warning about a custom scheduler does not apply",
            "AsyncScheduler" if is_async else "Scheduler",
            "on" if is_async else "off",
        )
        if not vllm_config.cache_config.enable_prefix_caching:
            logger.warning("impala: prefix caching is off: only requests that carry a session id are linked to traces")
        return scheduler


class _Observed(SyncScheduler):
    """The hooks. Each calls vLLM's own method unchanged."""

    observer: Observer
    bookkeeper: Bookkeeper | None = None
    bookkeeper_error: str | None = None

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:  # else the next input of a streaming session
            self._arrived(request)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        if self.bookkeeper is not None:
            held, fetching = self._kept_back()
            self.note(lambda keeper: keeper.scheduled(output, held, fetching))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        if self.bookkeeper is not None:
            self.note(lambda keeper: keeper.stepping(scheduler_output))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.observer.on_step(scheduler_output.total_num_scheduled_tokens)
        if self.bookkeeper is not None:
            self.note(Bookkeeper.stepped)
        return outputs

    def forget(self, trace_id: TraceId) -> None:
        """The trace left the table."""
        if self.bookkeeper is not None:
            self.note(lambda keeper: keeper.forget(trace_id))

    def shutdown(self) -> None:
        if self.bookkeeper is not None:
            self.note(Bookkeeper.close)
        super().shutdown()

    def _preempt_request(self, request: Request, timestamp: float, *args: Any, **kwargs: Any) -> None:
        if self.bookkeeper is not None:
            self.note(lambda keeper: keeper.preempting(request))
        super()._preempt_request(request, timestamp, *args, **kwargs)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        freed = super()._free_request(request, delay_free_blocks)
        self.observer.on_finish(request)
        if self.bookkeeper is not None:
            self.note(lambda keeper: keeper.finish(request))
        return freed

    def _arrived(self, request: Request) -> Link | None:
        link = self.observer.on_arrival(request)
        if self.bookkeeper is not None:
            trace = self._trace(link.trace_id) if link is not None else None
            self.note(lambda keeper: keeper.arrive(request, link, trace))
        return link

    def _trace(self, trace_id: TraceId | None) -> Trace | None:
        identity = self.observer.identity
        return identity.traces.get(trace_id) if identity is not None else None

    def _kept_back(self) -> tuple[frozenset[str], frozenset[str]]:
        """Requests that policy holds, and those that wait for KV from NVMe."""
        return _NOBODY, _NOBODY

    def note(self, verb: Callable[[Bookkeeper], None]) -> None:
        """Keep the ledger; where that fails, it ends here."""
        if (keeper := self.bookkeeper) is None:
            return
        started_ns = time.perf_counter_ns()
        try:
            verb(keeper)
        except Exception as e:
            self.bookkeeper, self.bookkeeper_error = None, type(e).__name__
            logger.exception("impala: the ledger failed and is switched off, serving continues")
        spent_ns = time.perf_counter_ns() - started_ns
        keeper.spent_ns += spent_ns
        self.observer.spent_ns += spent_ns


class _Enforced(_Observed):
    """The hooks through which policy steers: a plan before each step, claims on what is freed."""

    enforcer: Enforcer | None = None

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            self._leave_out(request)
            link = self._arrived(request)
            is_turn = link is not None  # else one more sample of one, if anything
            link = link or self.observer.link_of(request)
            trace_id = link.trace_id if link is not None else None
            stem, trace = self._stem_blocks(request), self._trace(trace_id) if is_turn else None
            self._steer(lambda policy: policy.arrive(request, trace_id, self.observer.clock(), stem, trace))
        super(_Observed, self).add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._steer(lambda policy: policy.plan(self.observer.clock()))
        output = super().schedule(throttle_prefills)
        self._steer(lambda policy: policy.scheduled(output, self.observer.clock(), throttle_prefills))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        moved = model_runner_output.kv_connector_output
        self._steer(lambda policy: policy.stepped(scheduler_output, self.observer.clock(), moved))
        return super().update_from_output(scheduler_output, model_runner_output)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        done, manager = super().reset_prefix_cache(reset_running_requests, reset_connector), tier_manager(self)
        if done and manager is not None:
            manager.takes_nothing = False
            if not reset_connector:
                # Weights may have changed: what lies in our tiers is as stale as what lay in HBM.
                done = self.reset_connector_cache()
        if done:
            self._steer(Enforcer.reset)
        return done

    def reset_connector_cache(self) -> bool:
        side = getattr(self.connector, "connector_scheduler", None)
        if tier_manager(self) is not None and side is not None and side._current_batch_jobs_to_flush:
            return True  # it was just emptied, and vLLM's connector asserts that there was a step since
        return super().reset_connector_cache()

    def weights_changed(self) -> None:
        """What lies in our tiers is of weights that are gone; HBM is left to whoever changed them, as in vLLM.

        Until HBM is reset, what it has would come down again: vLLM offers running turns' chunks anew after a reset of
        the tiers, and those that a later turn finds.
        """
        manager = tier_manager(self)
        if manager is not None:
            logger.info_once("impala: weights were changed: the tiers are emptied, now and whenever that happens")
            self.reset_connector_cache()
            manager.takes_nothing = len(self.kv_cache_manager.block_pool.cached_block_hash_to_block) > 0
            if manager.takes_nothing:
                logger.info_once("impala: HBM has KV of the weights before: until it is reset the tiers take nothing")

    def _free_request_blocks(self, request: Request) -> None:
        self._steer(lambda policy: policy.claims.claim(request, self._stem_blocks(request)))
        super()._free_request_blocks(request)
        self._steer(lambda policy: policy.claims.unclaim())

    def _drain_deferred_frees(self) -> None:
        """Blocks that a step in flight might still have written, one request's after the other."""
        deferred = self.deferred_frees
        while deferred and deferred[0][0] <= self.processed_step_seq:
            blocks = deferred[0][1]
            self.deferred_frees = deque([deferred.popleft()])
            self._steer(lambda policy, blocks=blocks: policy.claims.reclaim(blocks))
            super()._drain_deferred_frees()
            self._steer(lambda policy: policy.claims.unclaim())
        self.deferred_frees = deferred

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        stem = self._stem_blocks(request)
        freed = super()._free_request(request, delay_free_blocks)
        self._steer(
            lambda policy: policy.finish(request, self.observer.clock(), self._trace(policy.trace_of(request)), stem)
        )
        return freed

    def forget(self, trace_id: TraceId) -> None:
        super().forget(trace_id)
        if self.enforcer is not None:
            self.enforcer.forget(trace_id)

    def forget_all(self) -> None:
        """Nobody tells traces apart any more."""
        self._steer(Enforcer.forget_all)

    def _kept_back(self) -> tuple[frozenset[str], frozenset[str]]:
        return self.enforcer.gate.kept_back() if self.enforcer is not None else super()._kept_back()

    def _leave_out(self, request: Request) -> None:
        """Keep the tiers from a request whose adapter may have other weights than its hashes say."""
        adapter, manager = request.lora_request, tier_manager(self)
        if adapter is not None and manager is not None and not manager.adapters.may_use_tiers(adapter):
            manager.leave_out(request.request_id)

    def _stem_blocks(self, request: Request) -> int:
        return self.observer.shared_depth(request)

    def _steer(self, verb: Callable[[Enforcer], None]) -> None:
        """Let policy do its part; where it fails, stock order from here on."""
        if self.enforcer is None:
            return
        started_ns = time.perf_counter_ns()
        try:
            verb(self.enforcer)
        except Exception:
            logger.exception("impala: policy failed and falls back to stock order, serving continues")
            policy, self.enforcer = self.enforcer, None
            try:
                policy.retire()
            except Exception:
                logger.exception("impala: policy left some of its order behind")
        self.observer.spent_ns += time.perf_counter_ns() - started_ns


class ObservedSync(_Observed):
    """For configurations without async scheduling."""


class ObservedAsync(_Observed, AsyncScheduler):
    """For async scheduling; its base keeps the overlap."""


class EnforcedSync(_Enforced):
    """Policy over the synchronous base."""


class EnforcedAsync(_Enforced, AsyncScheduler):
    """Policy over the asynchronous base."""


def _diffusion(is_async: bool) -> type[SyncScheduler]:
    from vllm.v1.core.sched import diffusion_scheduler

    return diffusion_scheduler.DiffusionAsyncScheduler if is_async else diffusion_scheduler.DiffusionScheduler
