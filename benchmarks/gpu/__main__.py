"""`python -m benchmarks.gpu`: measure what a GPU is needed for, in under ten minutes; without one say so and exit 0.

Steps run in order of value, each in a process of its own, until the budget is spent; each prints what it finds as it
finds it, and appends records to the output folder. Standard library and torch; no network. See README.md.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import bundle, steps, summary
from benchmarks.gpu.launch import Launcher
from benchmarks.gpu.steps import Status, Step

PROBE = "import torch; print(torch.__version__, torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def main(arguments: list[str] | None = None) -> int:
    """0 also where steps failed: each says so itself. 2 for a wrong command line."""
    args = _parser().parse_args(arguments)
    try:
        chosen = steps.pick(args.only, args.without, rehearsal=args.rehearse)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if args.list:
        for step in chosen:
            print(f"{step.name}: at least {step.needs_s:g} s, at most {step.limit_s:g}")
        return 0
    began = time.monotonic()  # asking for the GPU may take minutes, which the budget pays
    if not args.rehearse and (why := no_gpu()):
        print(f"no GPU here ({why}): nothing to measure", flush=True)
        return 0
    directory = Path(args.out or os.environ.get("OUT") or bundle.ROOT / "out" / "gpu").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="impala-gpu-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        site = None
        if any(step.needs_vllm for step in chosen) and not args.rehearse:
            site = scratch / "site"
            site.mkdir()
            bundle.unpack(bundle.BUNDLES, site, say)
            chosen = _possible(chosen, bundle.missing(site))
        command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
        env = bundle.environment(
            os.environ, site, scratch, rehearsal=args.rehearse, commit=args.commit, command=command
        )
        env |= {"IMPALA_GPU_HOST_GIB": str(args.host_gib), "IMPALA_GPU_TRACES": str(args.traces or "")}
        env |= {"IMPALA_GPU_PREFILL_S": str(args.prefill_s or "")}
        outcomes = steps.run(chosen, args.budget_s - (time.monotonic() - began), Launcher(directory, env), say)
    for line in summary.lines(directory):
        say(line)
    counts = [f"{sum(o.status is status for o in outcomes)} {status.value}" for status in Status]
    say(f"{', '.join(counts)}, {time.monotonic() - began:.0f} s; records and logs in {directory}")
    return 0


def _possible(chosen: list[Step], missing: list[str]) -> list[Step]:
    """The steps that can run without these modules; says which cannot."""
    if missing:
        say(f"neither in {bundle.BUNDLES.name}/ nor installed: {', '.join(missing)}")
    if "vllm" not in missing:
        return chosen
    for step in chosen:
        if step.needs_vllm:
            say(f"{step.name}: left out, there is no vLLM")
    return [step for step in chosen if not step.needs_vllm]


def say(text: str) -> None:
    print(text, flush=True)


def no_gpu() -> str | None:
    """Why there is nothing to run on; None where there is a GPU. Asked in a child: drivers can hang."""
    try:
        found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"asking torch: {type(e).__name__}"
    if found.returncode != 0:
        return f"torch: {(found.stderr.strip().splitlines() or ['no answer'])[-1][:200]}"
    version, count = found.stdout.split()[-2:]
    return None if int(count) else f"torch {version} sees none"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=565.0, help="start no step that does not fit (565)")
    parser.add_argument("--only", type=_names, default=(), help="these steps, by name or first word, comma-separated")
    parser.add_argument("--without", type=_names, default=(), help="all but these")
    parser.add_argument("--out", help="folder for records and logs; else $OUT, else out/gpu")
    parser.add_argument("--traces", type=Path, help="recorded log; else .gpu/sessions.jsonl, else the bundled one")
    parser.add_argument("--host-gib", type=float, default=8.0, help="most pinned host memory of an engine (8)")
    parser.add_argument("--prefill-s", type=float, help="seconds of uncached prefill in session replays (40; 8 B: 15)")
    parser.add_argument("--commit", help="what the records say, where the tree has no history")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU: all the logic, no figures")
    parser.add_argument("--list", action="store_true", help="say which steps there are")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
