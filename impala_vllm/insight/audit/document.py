"""The report as plain data, for scripts (`impala audit --json`)."""

from typing import Any

from impala_vllm.insight.audit.bloat import FIXES as BLOAT_FIXES
from impala_vllm.insight.audit.causes import FIXES
from impala_vllm.insight.audit.report import Report, Total, dearest, tokens
from impala_vllm.insight.audit.systems import Systems

_SYSTEMS = 5


def document(report: Report, price_per_mtok: float | None, show_text: bool = False) -> dict[str, Any]:
    """Money only with a price; headings of system prompts only with `show_text`."""

    def totals(found: dict[Any, Total]) -> list[dict[str, Any]]:
        return [_total(total, price_per_mtok) for total in dearest(found.values())]

    return {
        "requests": report.requests,
        "sessions": report.sessions,
        "sessions_forgotten": report.sessions_forgotten,
        "resumed": report.resumed,
        "normalised": report.normalised,
        "skipped": report.skipped,
        "first_error": report.first_error,
        "tokens_are_estimated": report.estimated,
        "requests_with_token_counts": report.counted,
        "turns_with_cache_counts": report.served,
        "prompt_tokens": report.prompt_tokens,
        "lost_tokens": report.lost_tokens,
        **_cost(report.lost_tokens, price_per_mtok),
        "causes": totals(report.totals),
        "starts": totals(report.starts),
        "answers": totals(report.answers),
        "turns_after_answers": report.answered,
        "missing_answers": report.missing_answers,
        "worst": [finding.document() for finding in report.worst],
        "worst_sessions": [
            {"session": w.session, "turns": w.turns, "findings": w.findings, "lost_tokens": w.lost_tokens}
            for w in report.worst_sessions
        ],
        "tools": [
            {
                "name": tool.name,
                "schema_tokens": tokens(tool.schema_bytes),
                "requests": tool.num_requests,
                "calls": tool.num_calls,
            }
            for tool in report.tools
        ],
        "systems": _systems(report.carried.systems, show_text),
        "images": {"number": report.carried.images, "tokens": report.carried.image_tokens},
        "bloat": _bloat(report),
    }


def _total(total: Total, price_per_mtok: float | None) -> dict[str, Any]:
    return {
        "cause": total.cause.value,
        "turns": total.turns,
        "sessions": len(total.sessions),
        "lost_tokens": total.lost_tokens,
        **_cost(total.lost_tokens, price_per_mtok),
        "segments": dict(total.segments.most_common()),
        "fix": FIXES[total.cause],
    }


def _bloat(report: Report) -> list[dict[str, Any]]:
    return [
        {"kind": w.kind.value, "number": w.number, "tokens": tokens(w.num_bytes), "fix": BLOAT_FIXES[w.kind]}
        for w in report.wastes()
    ]


def _systems(systems: Systems, show_text: bool) -> list[dict[str, Any]]:
    return [
        {
            "tokens": tokens(system.num_bytes),
            "requests": system.requests,
            "sections": [
                {"number": s.number, "tokens": tokens(s.num_bytes), **({"title": s.title} if show_text else {})}
                for s in system.sections()
            ],
        }
        for system in systems.by_weight()[:_SYSTEMS]
    ]


def _cost(num: int, price_per_mtok: float | None) -> dict[str, float]:
    return {} if price_per_mtok is None else {"cost": round(num * price_per_mtok / 1e6, 6)}
