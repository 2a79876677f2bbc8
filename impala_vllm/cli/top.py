"""`impala top`: a live server in a terminal: traces by state, KV by tier, hit ratio, holds, what is degraded."""

import time

import click
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from impala_vllm.cli.live_server import Unreachable, get, get_json, is_address
from impala_vllm.cli.printable import printable
from impala_vllm.config import ConfigError
from impala_vllm.insight import live
from impala_vllm.insight.live import Rates, View

MAX_ROWS = 500
"""Traces asked for in each state."""
_STYLES = {"ok": "green", "idle": "green", "degraded": "yellow", "stalled": "red"}
_NAMES = {"local_compute": "computed", "local_cache_hit": "HBM", "external_kv_transfer": "below HBM"}


@click.command()
@click.option("--url", default="http://localhost:8000", show_default=True, help="A server with --scheduler impala.")
@click.option("--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Seconds.")
@click.option("--api-key", envvar="VLLM_API_KEY", show_envvar=True, help="Where the server asks for one.")
@click.option("--once", is_flag=True, help="Print it once and leave; so it is where the output is no terminal.")
def top(url: str, interval: float, api_key: str | None, once: bool) -> None:
    """Watch a server. Ctrl-C leaves."""
    url = url.rstrip("/")
    if not is_address(url):
        raise ConfigError(f"--url {url}: not the address of a server; give http://HOST:PORT")
    try:
        now = look(url, api_key)
    except Unreachable as e:
        raise ConfigError(f"{url}: {e}; give --url http://HOST:PORT of a running server") from e
    console = Console()
    if once or not console.is_terminal:
        console.print(screen(url, now, live.rates(now, None), None, 20))
        return
    _watch(url, api_key, interval, now, console)


def look(url: str, api_key: str | None) -> View:
    """One look at the server. Raises Unreachable."""
    health = get_json(url, "/impala/health", api_key)
    pages = [get_json(url, f"/impala/traces?limit={MAX_ROWS}&state={state}", api_key) for state in ("running", "gap")]
    if not all("ranks" in answer for answer in (health, *pages)):
        raise Unreachable("the engine does not answer")
    return live.view(time.monotonic(), health, pages, get(url, "/metrics", api_key))


def screen(url: str, now: View, since: Rates, problem: str | None, num_rows: int) -> Group:
    """What is shown. `problem`: why it is not fresh."""
    return Group(_head(url, now, since, problem), _traces(now, num_rows))


def _watch(url: str, api_key: str | None, interval_s: float, now: View, console: Console) -> None:
    before: View | None = None
    problem: str | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as display:
            while True:
                rows = max(3, console.height - 14 - len(now.reasons) - len(now.trouble))
                display.update(screen(url, now, live.rates(now, before), problem, rows), refresh=True)
                time.sleep(interval_s)
                try:
                    fresh = look(url, api_key)
                except Unreachable as e:
                    problem = str(e)
                else:
                    before, now, problem = now, fresh, None
    except KeyboardInterrupt:
        return


def _head(url: str, now: View, since: Rates, problem: str | None) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("server", Text.assemble((now.status, _STYLES.get(now.status, "")), f", mode {now.mode}"))
    if problem is not None:
        table.add_row("", Text(printable(f"reconnecting: {problem}"), style="red"))
    table.add_row("traces", ", ".join(f"{count:,} {state}" for state, count in now.traces.items()))
    held = "" if now.held is None else f", {now.held:,} held"
    wait = "" if not now.longest_wait_s else f"; longest wait {now.longest_wait_s:,.1f} s"
    table.add_row("turns", f"{now.running:,} running, {now.waiting:,} waiting{held}{wait}")
    tiers = ", ".join(
        f"{t.name} {t.share:.0%}" + (f" of {t.size_gib:,.1f} GiB" if t.size_gib else "") for t in now.tiers
    )
    table.add_row("KV", f"{tiers or 'not told'}; working set {now.working_set_tokens:,} tokens")
    found = "-" if since.hit_ratio is None else f"{since.hit_ratio:.1%}"
    sources = ", ".join(f"{_NAMES[name]} {share:.0%}" for name, share in since.by_source.items())
    when = "since the start" if since.over_s is None else f"in {since.over_s:.1f} s"
    table.add_row("found", f"{found} of prompt tokens {when} ({sources})")
    per = " tokens" if since.over_s is None else " tokens/s"
    table.add_row("work", f"{since.prompt_tokens:,.0f} prompt and {since.output_tokens:,.0f} output{per}")
    for text in (*now.reasons, *now.trouble):
        table.add_row("", Text(printable(text), style="yellow"))
    return Panel(table, title=Text(f"impala top  {url}"), title_align="left")


def _traces(now: View, num_rows: int) -> Table:
    table = Table(expand=False, pad_edge=False)
    table.add_column("trace", no_wrap=True)
    table.add_column("parent", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("turns", "tokens", "age", "silent"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("known by", no_wrap=True)
    for row in now.trace_rows[:num_rows]:
        table.add_row(
            Text(printable(str(row["trace_id"]))),
            Text(printable(str(row["parent_trace_id"] or ""))),
            Text(printable(str(row["state"]))),
            f"{row['turns']:,}",
            f"{row['tokens']:,}",
            _age(row["age_s"]),
            _age(row["silent_s"]),
            Text(printable(f"{row['source']} {row['confidence']:.2f}")),
        )
    left = len(now.trace_rows) - num_rows
    if left > 0:
        table.add_row(f"and {left:,} more")
    return table


def _age(value_s: float) -> str:
    if value_s >= 5400:
        return f"{value_s / 3600:.1f} h"
    return f"{value_s / 60:.1f} min" if value_s >= 90 else f"{value_s:.1f} s"
