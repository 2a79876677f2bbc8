"""The `--scheduler impala` and `--impala-*` flags, and what vLLM's parsed arguments become with them.

Everything a user can get wrong is checked here, at the end of parsing and before anything heavy
starts: one line on stderr, exit code 2.
"""

import argparse
import errno
import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from impala_vllm.adapters.vllm import choice, compat, tiering
from impala_vllm.config import ConfigError, Mode, Settings, load
from impala_vllm.transfer.slab_directory import why_not_private

MIDDLEWARE = "impala_vllm.adapters.vllm.middleware.Middleware"

_FLAGS = {
    "--impala-mode": (
        "mode",
        "off|observe|enforce",
        "off: stock vLLM; observe: recognise traces, decide nothing; enforce (default): schedule by trace",
    ),
    "--impala-host-gib": ("tiers.host_gib", "G", "host DRAM for KV, in GiB"),
    "--impala-nvme-path": ("tiers.nvme_path", "DIR", "directory for KV on NVMe"),
    "--impala-nvme-gib": ("tiers.nvme_gib", "G", "size of the NVMe tier, in GiB"),
    "--impala-registry": ("registry", "URL", "fleet registry to announce this server to"),
    "--impala-ledger": ("ledger.path", "FILE", "JSONL file, one record a finished trace"),
}
_NUMBERS = ("tiers.host_gib", "tiers.nvme_gib")


def add_flags(parser: Any) -> None:
    """Add the flags, and finish the arguments as soon as this parser has parsed them."""
    group = parser.add_argument_group(title="impala", description="Trace-level scheduling (impala-vllm).")
    group.add_argument("--scheduler", metavar="{impala}", default=None, help="`impala`: schedule by trace")
    group.add_argument("--impala-config", metavar="FILE", default=None, help="YAML file; flags win over it")
    for flag, (_, metavar, text) in _FLAGS.items():
        group.add_argument(flag, metavar=metavar, default=None, help=text)

    parse_known_args = parser.parse_known_args

    def parse_and_finish(args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = parse_known_args(args, namespace)
        finish(parsed)
        return parsed, rest

    parser.parse_known_args = parse_and_finish


def finish(args: argparse.Namespace) -> None:
    """Turn the flags into vLLM's own arguments, or leave with one line. Idempotent."""
    scheduler_cls = getattr(args, "scheduler_cls", None)
    if isinstance(scheduler_cls, choice.Choice) or getattr(args, "impala_is_off", False):
        return
    named = getattr(args, "scheduler", None)
    given = [flag for flag in ("--impala-config", *_FLAGS) if getattr(args, _dest(flag), None) is not None]
    if named is None and not choice.is_ours(scheduler_cls):
        if given:
            fail(f"{given[0]}: works with --scheduler impala only; add it or drop {given[0]}")
        return
    if named not in (None, "impala"):
        fail(f"--scheduler: unknown scheduler {named!r}; choose impala, or leave the flag out for vLLM's own")
    if scheduler_cls is not None and not choice.is_ours(scheduler_cls):
        fail(f"--scheduler impala: --scheduler-cls {scheduler_cls} asks for another scheduler; drop one of them")
    try:
        compat.require()
        settings = _settings(args)
        _check_nvme(args, settings)
        _check_ledger(settings)
    except ConfigError as e:
        fail(str(e))
    _check_surroundings(args)
    _apply(args, settings)


def fail(message: str) -> NoReturn:
    """Leave with one line."""
    print(f"impala: {message}", file=sys.stderr)
    raise SystemExit(2)


def fail_to_load(model: str, error: OSError) -> NoReturn:
    """Leave because vLLM could not find `model`."""
    reason = next(iter(str(error).splitlines()), "")[:200]
    fail(f"model {model}: cannot be loaded ({reason}); give an existing directory or a hub name that can be reached")


def _settings(args: argparse.Namespace) -> Settings:
    flags: dict[str, tuple[str, Any]] = {}
    for flag, (name, _, _) in _FLAGS.items():
        value = getattr(args, _dest(flag), None)
        if value is not None:
            flags[name] = (flag, _number(value) if name in _NUMBERS else value)
    _reject_yaml_off(sys.argv)
    return load(args.impala_config or os.environ.get(choice.CONFIG_VARIABLE) or None, flags)


def _apply(args: argparse.Namespace, settings: Settings) -> None:
    if settings.config.mode is Mode.OFF:
        args.scheduler_cls, args.impala_is_off = None, True
        print("impala: mode off, this is stock vLLM", file=sys.stderr)
        return
    args.scheduler_cls = choice.Choice.of(settings)
    if isinstance(getattr(args, "middleware", None), list):
        args.middleware = [*args.middleware, MIDDLEWARE]


def _check_surroundings(args: argparse.Namespace) -> None:
    """What vLLM would answer with a traceback, late: a model that is not there, a taken port."""
    model = getattr(args, "model_tag", None) or getattr(args, "model", None)
    if isinstance(model, str) and _is_path(model) and not Path(model).expanduser().exists():
        fail(f"model {model}: no such file or directory; give an existing path or a hub name like org/model")
    serves = hasattr(args, "model_tag") and not getattr(args, "headless", False) and not getattr(args, "uds", None)
    if serves and _is_taken(args.host or "", args.port):
        fail(f"port {args.port} is taken by another process; stop that one or choose another with --port")


def _check_nvme(args: argparse.Namespace, settings: Settings) -> None:
    """Raise ConfigError where no slab can be made in the NVMe directory. Writes nothing.

    What shows only when the slab is opened, another server's lock for one, ends the engine process with such a line.
    """
    tiers = settings.config.tiers
    is_ours = settings.config.mode is Mode.ENFORCE and getattr(args, "kv_transfer_config", None) is None
    is_here = getattr(args, "data_parallel_size_local", None) != 0
    if tiers.nvme_path is None or not is_ours or not is_here:
        return
    directory = Path(tiers.nvme_path).expanduser().absolute()
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    where = f"{settings.origins.get('tiers.nvme_path', 'default')}: {directory}"
    if not os.path.isdir(there):  # unlike Path.is_dir, it answers where nobody may look
        raise ConfigError(f"{where}: {there} is not a directory; choose another one")
    disk = os.statvfs(there)
    if disk.f_flag & os.ST_RDONLY:
        raise ConfigError(f"{where}: the file system is read-only; choose another directory")
    files: list[Path] = []
    locked: Path | None = there
    if os.access(there, os.W_OK | os.X_OK):
        files = [*directory.glob("impala-dp*.slab"), *directory.glob("impala-dp*.index")]
        locked = next((file for file in files if not os.access(file, os.R_OK | os.W_OK)), None)
    if locked is not None:
        raise ConfigError(f"{where}: this user may not write to {locked}; allow it or choose another directory")
    if there == directory and (reason := why_not_private(directory)) is not None:
        raise ConfigError(f"{settings.origins.get('tiers.nvme_path', 'default')}: {reason}")
    # A slab of an earlier run is used again, or gives up its place.
    room_gib = (disk.f_bavail * disk.f_frsize + sum(file.stat().st_blocks * 512 for file in files)) / tiering.GIB
    if disk.f_blocks and tiers.nvme_gib > room_gib:
        raise ConfigError(
            f"{settings.origins.get('tiers.nvme_gib', 'default')}: {directory} has {room_gib:.2f} GiB to spare, "
            f"not {tiers.nvme_gib:g}; lower tiers.nvme_gib, free some space or choose another directory"
        )


def _check_ledger(settings: Settings) -> None:
    """Raise ConfigError where no ledger can be written. Writes nothing."""
    path = settings.config.ledger.path
    if path is None or settings.config.mode is Mode.OFF:
        return
    file = Path(path).expanduser().absolute()
    where = f"{settings.origins.get('ledger.path', 'default')}: {file}"
    if file.is_dir() or (os.path.lexists(file) and not file.is_file()):
        raise ConfigError(f"{where}: not a regular file; give the name of one")
    if not file.parent.is_dir():
        raise ConfigError(f"{where}: there is no directory {file.parent}; make it, or choose another one")
    locked = next((p for p in (file.parent, file) if p.exists() and not os.access(p, os.W_OK)), None)
    if locked is not None:
        raise ConfigError(f"{where}: this user may not write to {locked}; allow it or choose another file")


def _is_path(model: str) -> bool:
    return "://" not in model and (model.startswith(("/", "./", "../", "~")) or model.count("/") > 1)


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            return e.errno == errno.EADDRINUSE
    return False


def _reject_yaml_off(argv: list[str]) -> None:
    """vLLM's --config reads a bare `impala-mode: off` as false and drops the line without a word."""
    if "--config" not in argv[:-1]:
        return
    import yaml

    file = argv[argv.index("--config") + 1]
    data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    for key in ("impala-mode", "impala_mode"):
        if isinstance(data, dict) and data.get(key) is False:
            raise ConfigError(f'{file}: {key}: YAML reads a bare off as false; write "off" in quotes')


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # config.load() says what is wrong with it


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
