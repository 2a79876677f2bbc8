"""An audit for people: causes by cost, what to do, the worst of it. Right at 80 columns."""

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from impala_vllm.cli.printable import printable
from impala_vllm.insight.audit import FIXES, Report
from impala_vllm.insight.audit.bloat import FIXES as BLOAT_FIXES
from impala_vllm.insight.audit.bloat import Bloat
from impala_vllm.insight.audit.report import Finding, Total, Worst, dearest, tokens

_SHOWN = 5
_COUNTED = {
    Bloat.IDLE_TOOLS: "tools",
    Bloat.REPEATED: "sessions",
    Bloat.LOOPED: "texts",
    Bloat.LARGE_IMAGES: "images",
    Bloat.PROSE_SCHEMA: "requests",
}

Say = Callable[[str], None]


def show(report: Report, price: float | None, show_text: bool, console: Console) -> None:
    """Print it. `price` is of a million tokens."""

    def say(text: str) -> None:
        console.print(Text(printable(text)))  # what a log says is no markup

    about = "about " if report.estimated else ""
    share = report.lost_tokens / report.prompt_tokens if report.prompt_tokens else 0.0
    say(
        f"{report.requests:,} requests in {report.sessions:,} sessions, {report.resumed:,} with a turn before them; "
        f"{about}{report.prompt_tokens:,} prompt tokens, {about}{report.lost_tokens:,} ({share:.1%}) computed again "
        "because a prompt changed or was no longer cached."
    )
    if report.totals:
        console.print(_causes("Why prefixes miss", report.causes(), price))
        _fixes(report.causes(), say)
        if report.worst_sessions:
            console.print(_sessions(report.worst_sessions[:_SHOWN]))
        console.print(_worst(report.worst[:_SHOWN]))
        for finding in report.worst[:_SHOWN]:
            if finding.now is not None:
                where = f"{finding.session}, turn {finding.turn}, {finding.segment}"
                say(f"- {where}:\n    was {finding.was!r}\n    now {finding.now!r}")
    else:
        say("Every prompt begins with the one before it.")
    for title, totals in (
        ("First prompts that could begin like another session's", report.starts),
        ("Answers that come back changed: the KV made with them is lost", report.answers),
    ):
        if totals:
            console.print(_causes(title, dearest(totals.values()), price))
            _fixes([t for t in dearest(totals.values()) if t.cause not in report.totals], say)
    _rest(report, show_text, say, console)


def _causes(title: str, totals: Iterable[Total], price: float | None) -> Table:
    table = Table("cause", "where", title=title, title_justify="left")
    for heading in ("turns", "sessions", "tokens", *(["cost"] if price is not None else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for total in totals:
        money = [] if price is None else [f"{total.lost_tokens * price / 1e6:.2f}"]
        where = ", ".join(name for name, _ in total.segments.most_common(3))
        table.add_row(
            total.cause.value, where, f"{total.turns:,}", f"{len(total.sessions):,}", f"{total.lost_tokens:,}", *money
        )
    return table


def _fixes(totals: Iterable[Total], say: Say) -> None:
    for total in totals:
        say(f"- {total.cause.value}: {FIXES[total.cause]}")


def _sessions(sessions: list[Worst]) -> Table:
    table = Table(title="Worst sessions", title_justify="left")
    table.add_column("session", overflow="ellipsis", no_wrap=True, max_width=32)
    for heading in ("turns", "prefix lost", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for worst in sessions:
        table.add_row(
            Text(printable(worst.session)), f"{worst.turns:,}", f"{worst.findings:,}", f"{worst.lost_tokens:,}"
        )
    return table


def _worst(findings: list[Finding]) -> Table:
    table = Table(title="Dearest turns", title_justify="left")
    table.add_column("session", overflow="ellipsis", no_wrap=True, max_width=16)
    table.add_column("turn", justify="right")
    table.add_column("block", justify="right")
    for heading in ("segment", "cause"):
        table.add_column(heading)
    table.add_column("tokens", justify="right", no_wrap=True)
    for f in findings:
        table.add_row(
            Text(printable(f.session)), str(f.turn), str(f.block), f.segment, f.cause.value, f"{f.lost_tokens:,}"
        )
    return table


def _rest(report: Report, show_text: bool, say: Say, console: Console) -> None:
    """What is carried without need, and what the figures stand on."""
    if report.missing_answers:
        say(
            f"{report.missing_answers:,} of {report.answered:,} answers are not in the prompt that follows: either the "
            "log leaves them out, or the agent does and forgets what it said."
        )
    _tools(report, say, console)
    _systems(report, show_text, say)
    _bloat(report, say, console)
    if report.normalised:
        say(f"{report.normalised:,} prompts count as if their system prompt had kept its first clock and ids.")
    if report.estimated:
        counted = f" where it has no count of them ({report.counted:,} have)" if report.counted else ""
        say(f"Tokens are estimated{counted}: four bytes of text count as one, an image by its size.")
    if not report.served:
        say("The log does not say what was cached: evictions are not in these figures.")
    if report.sessions_forgotten:
        say(f"{report.sessions_forgotten:,} sessions were forgotten for want of room; if they went on, as new ones.")
    if report.skipped:
        say(f"{report.skipped:,} lines or files were skipped; the first: {report.first_error}")


def _tools(report: Report, say: Say, console: Console) -> None:
    if not report.tools:
        return
    total = sum(tokens(tool.schema_bytes) for tool in report.tools)
    table = Table(title=f"Tools: {len(report.tools)}, about {total:,} tokens of schemas", title_justify="left")
    table.add_column("tool", overflow="ellipsis", no_wrap=True, max_width=32)
    for heading in ("tokens", "requests", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    idle = report.never_called()
    shown = [*idle[:_SHOWN], *(tool for tool in report.tools if tool.num_calls)][: 2 * _SHOWN]
    for tool in shown:
        calls = f"{tool.num_calls:,}" if tool.num_calls else "never"
        table.add_row(Text(printable(tool.name)), f"{tokens(tool.schema_bytes):,}", f"{tool.num_requests:,}", calls)
    console.print(table)
    if len(shown) < len(report.tools):
        say(f"- and {len(report.tools) - len(shown)} more, {len(idle[_SHOWN:])} of them never called (--json has all)")


def _systems(report: Report, show_text: bool, say: Say) -> None:
    for system in report.carried.systems.by_weight()[:1]:
        size = tokens(system.num_bytes)
        say(f"The system prompt carried most: about {size:,} tokens in {system.requests:,} requests.")
        sections = system.sections()
        if len(sections) > 1:
            largest = sorted(sections, key=lambda s: -s.num_bytes)[:3]
            named = [
                f"{s.title if show_text else f'section {s.number}'} ({tokens(s.num_bytes):,} tokens)" for s in largest
            ]
            say(f"- largest of its {len(sections)} sections: {', '.join(named)}")


def _bloat(report: Report, say: Say, console: Console) -> None:
    wastes = report.wastes()
    if not wastes:
        return
    table = Table("what", title="Carried without need, each counted once", title_justify="left")
    for heading in ("number", "of", "tokens"):
        table.add_column(heading, justify="left" if heading == "of" else "right", no_wrap=True)
    for waste in wastes:
        table.add_row(waste.kind.value, f"{waste.number:,}", _COUNTED[waste.kind], f"{tokens(waste.num_bytes):,}")
    console.print(table)
    for waste in wastes:
        say(f"- {waste.kind.value}: {BLOAT_FIXES[waste.kind]}")
