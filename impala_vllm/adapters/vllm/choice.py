"""The choice of impala as scheduler, and the settings it travels with.

vLLM rebuilds its arguments from field names several times (`vars`, `asdict`, `from_cli_args`)
and drops what it does not know, so the settings ride on a field it does know: `scheduler_cls`.
From there they are put on the VllmConfig, which is pickled to the engine processes. They stay
out of `additional_config`, which enters vLLM's compile-cache hash.
"""

import os
from typing import Any

from impala_vllm import __version__
from impala_vllm.adapters.vllm import compat
from impala_vllm.config import Config, Settings, dump, load, restore

SCHEDULER = "impala_vllm.Scheduler"
CONFIG_VARIABLE = "IMPALA_CONFIG"
_ATTRIBUTE = "impala_settings"


class Choice(str):
    """The scheduler's dotted name, carrying the settings it was chosen with."""

    impala_settings: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings) -> "Choice":
        choice = cls(SCHEDULER)
        choice.impala_settings = dump(settings)
        return choice


def is_ours(scheduler_cls: Any) -> bool:
    """Whether this value of vLLM's `scheduler_cls` names impala."""
    if isinstance(scheduler_cls, str):
        return scheduler_cls in (SCHEDULER, "impala_vllm.adapters.vllm.scheduler.Scheduler")
    return getattr(scheduler_cls, "__module__", "").startswith("impala_vllm.")


def adopt(engine_args: Any, vllm_config: Any) -> None:
    """Put the settings on the finished VllmConfig and say once what was chosen.

    Raises ConfigError where impala cannot work; the command line has checked that before.
    """
    compat.require()
    settings = asked(engine_args)
    setattr(vllm_config, _ATTRIBUTE, dump(settings))
    first = engine_args._api_process_rank == -1 or engine_args._api_process_count == 1
    if first:  # one front-end process speaks for all
        _announce(settings)


def asked(engine_args: Any) -> Settings:
    """The settings that travel on these arguments, else the environment's or the defaults."""
    data = getattr(engine_args.scheduler_cls, _ATTRIBUTE, None)
    return restore(data) if data is not None else from_environment()


def of(vllm_config: Any) -> Settings:
    """The settings of this engine; the environment's or the defaults where no plugin put any."""
    data = getattr(vllm_config, _ATTRIBUTE, None)
    return restore(data) if data is not None else from_environment()


def from_environment() -> Settings:
    """IMPALA_CONFIG=FILE, or the defaults."""
    return load(os.environ.get(CONFIG_VARIABLE) or None)


def not_active(config: Config) -> list[str]:
    """One line for each thing that was asked for and does not exist in this version."""
    if config.registry is None:
        return []
    what = "a server announces itself to nobody; name it to `impala router` with --worker or --workers-file"
    return [f"registry is not active in {__version__}: {what}"]


def say(line: str) -> None:
    """One line of the log, once a process."""
    from vllm.logger import init_logger

    init_logger("vllm.impala").warning_once(f"impala: {line}")


def _announce(settings: Settings) -> None:
    from vllm.logger import init_logger

    logger = init_logger("vllm.impala")
    logger.info("impala %s is the scheduler; settings:\n  %s", __version__, "\n  ".join(settings.describe()))
    for line in not_active(settings.config):
        say(line)
