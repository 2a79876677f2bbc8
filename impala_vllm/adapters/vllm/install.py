"""Hooks impala into vLLM's argument handling: the one place outside the engine that replaces vLLM functions.

Three functions of EngineArgs are wrapped. Each wrapper calls the original first and then
does nothing unless impala is selected, so an installed but unselected impala changes nothing.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from impala_vllm.adapters.vllm import choice, command_line, tiering
from impala_vllm.config import ConfigError

_MARK = "wrapped_by_impala"


def install() -> None:
    """Wrap EngineArgs once; later calls find the mark and leave."""
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs.create_engine_config, _MARK):
        return
    cls: Any = EngineArgs
    cls.add_cli_args = staticmethod(_with_flags(EngineArgs.add_cli_args))
    cls.from_cli_args = classmethod(_with_finish(EngineArgs.from_cli_args.__func__))
    cls.create_engine_config = _with_settings(EngineArgs.create_engine_config)


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        command_line.add_flags(parser)
        return parser

    return add_cli_args


def _with_finish(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        command_line.finish(args)  # parsing did it already; a no-op then
        with _leaving(args.scheduler_cls, args.model):
            return original(cls, args)

    return from_cli_args


def _with_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _leaving(self.scheduler_cls, self.model):
            if not choice.is_ours(self.scheduler_cls):
                return original(self, *args, **kwargs)
            settings = choice.asked(self).config
            config = tiering.build(self, settings, lambda: original(self, *args, **kwargs), choice.say)
        choice.adopt(self, config)
        return config

    setattr(create_engine_config, _MARK, True)
    return create_engine_config


@contextlib.contextmanager
def _leaving(scheduler_cls: Any, model: str) -> Iterator[None]:
    """Where impala was chosen on a command line, what cannot be ends it with one line: a model, tiers, settings."""
    try:
        yield
    except ConfigError as e:
        if isinstance(scheduler_cls, choice.Choice):
            command_line.fail(str(e))
        raise
    except OSError as e:
        if isinstance(scheduler_cls, choice.Choice):
            command_line.fail_to_load(model, e)
        raise
