"""`python -m benchmarks.gpu.child STEP DIRECTORY LIMIT_S`: run one step in this process.

Everything but the step's own lines goes to DIRECTORY/STEP.log, what native code prints included. Exit 0: done; 3:
nothing to do here, for the reason printed; anything else: it failed.
"""

import faulthandler
import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

from benchmarks.gpu import steps
from benchmarks.gpu.bundle import reach_ops
from benchmarks.gpu.out import Out, Skipped, origin

SKIPPED = 3


def main(name: str, directory: Path, limit_s: float) -> int:
    """Run it; says why on the terminal when it fails."""
    terminal = _divert(directory / f"{name}.log")
    faulthandler.enable()
    # Before the parent's patience ends: where did it hang?
    faulthandler.dump_traceback_later(max(1.0, limit_s - 3.0), exit=False)
    (step,) = (s for s in steps.STEPS if s.name == name)
    try:
        reach_ops()
        from benchmarks.gpu import device

        out = Out(name, directory, terminal, origin(device.name()), is_rehearsal=device.is_rehearsal())
        module, _, function = step.function.partition(":")
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(out, **dict(step.arguments))
    except Skipped as e:
        print(f"  {name}: {e}", file=terminal, flush=True)
        return SKIPPED
    except BaseException:
        traceback.print_exc()
        for line in traceback.format_exc().strip().splitlines()[-6:]:
            print(f"  {name}: | {line[:300]}", file=terminal, flush=True)
        return 1
    return 0


def _divert(log: Path) -> TextIO:
    """Send this process's output to a file; returns the terminal."""
    sys.stdout.flush()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    return terminal


if __name__ == "__main__":
    code = main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    # An engine's threads and atexit handlers may hang; all that matters is written.
    os._exit(code)
