"""Results as people read them: a table, curves, heatmaps, a page. Plain values; drawing is the script's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvjax.evaluate.machine import machine_line

Entry = dict[str, Any]

QUALITIES = {
    "recall": ("answered", "recall: answers right"),
    "tracking": ("answered", "tracking: chains right"),
    "copy": ("copied", "copy: tokens right"),
    "text": ("excess_nats", "text: nats per token above the full cache"),
}
"""Task -> the metric that stands for it, and what to call it."""


class Column(NamedTuple):
    """A column of the table: its title, the task it needs (None: any), and its cell."""

    title: str
    task: str | None
    cell: Callable[[Entry], str]


def percent(estimate: dict[str, Any]) -> str:
    """A share and its standard error."""
    error = "" if estimate["error"] is None else f" ±{100 * estimate['error']:.0f}"
    return f"{100 * estimate['value']:.0f}%{error}"


def number(estimate: dict[str, Any], digits: int = 3) -> str:
    """A number and its standard error."""
    error = "" if estimate["error"] is None else f" ±{estimate['error']:.{digits}f}"
    return f"{estimate['value']:.{digits}f}{error}"


def _metric(name: str, form: Callable[[dict[str, Any]], str]) -> Callable[[Entry], str]:
    return lambda entry: form(entry["metrics"][name])


def _kilobytes(name: str) -> Callable[[Entry], str]:
    return lambda entry: f"{entry['bytes'][name] / 1000:,.0f}"


def _speed(entry: Entry) -> str:
    rate = entry["seconds"]["decode_tokens_per_second"]
    return "" if rate is None else f"{rate:,.0f}"


COLUMNS = (
    Column("kB held", None, _kilobytes("held")),
    Column("kB read a step", None, _kilobytes("read")),
    Column("nats per token", "text", _metric("nats", number)),
    Column("perplexity", "text", _metric("perplexity", lambda e: number(e, 2))),
    Column("above full", "text", _metric("excess_nats", number)),
    Column("agreement", "text", _metric("agreement", percent)),
    Column("KL", "text", _metric("divergence", number)),
    Column("recall", "recall", _metric("answered", percent)),
    Column("tracking", "tracking", _metric("answered", percent)),
    Column("copied", "copy", _metric("copied", percent)),
    Column("tokens/s", None, _speed),
)


def table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Titles, and one row of cells per cache; columns of tasks that nobody ran are left out.

    Bytes and speed are those of the text, or of the first task run.
    """
    rows = _by_row(entries)
    tasks = {entry["task"] for entry in entries}
    columns = [column for column in COLUMNS if column.task is None or column.task in tasks]
    lines = []
    for name, found in rows.items():
        first = found.get("text") or next(iter(found.values()))
        share = _share(first, rows)
        cells = [_cell(column, first if column.task is None else found.get(column.task)) for column in columns]
        lines.append([name, share, *cells])
    return ["cache", "of the first", *(column.title for column in columns)], lines


def by_kind(entries: Sequence[Entry], task: str, metric: str) -> tuple[list[str], list[list[str]]]:
    """Titles, and one row per cache: shares by depth (`recall`, "by_depth") or hops (`tracking`, "by_hops")."""
    chosen = [entry for entry in entries if entry["task"] == task]
    kinds = list(chosen[0]["metrics"][metric]) if chosen else []
    lines = [[_name(entry), *(percent(entry["metrics"][metric][kind]) for kind in kinds)] for entry in chosen]
    return ["cache", *kinds], lines


def curves(entries: Sequence[Entry], task: str, size: str = "held") -> dict[str, list[tuple[float, float, float]]]:
    """Label -> (bytes, quality, its error) of each of its caches, by bytes; `size` as in `Footprint`."""
    name = QUALITIES[task][0]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for entry in entries:
        if entry["task"] == task:
            quality = entry["metrics"][name]
            point = (float(entry["bytes"][size]), quality["value"], quality["error"] or 0.0)
            found.setdefault(entry["label"], []).append(point)
    return {label: sorted(points) for label, points in found.items()}


def heatmaps(entries: Sequence[Entry]) -> dict[str, tuple[list[str], list[str], list[list[float]]]]:
    """Label -> points, depths, and recall as [point][depth], of labels that were swept."""
    found: dict[str, tuple[list[str], list[str], list[list[float]]]] = {}
    for entry in entries:
        if entry["task"] == "recall" and entry["point"]:
            depths = entry["metrics"]["by_depth"]
            points, _, values = found.setdefault(entry["label"], ([], list(depths), []))
            points.append(entry["point"])
            values.append([estimate["value"] for estimate in depths.values()])
    return found


def markdown(entries: Sequence[Entry], identity: dict[str, Any], about: dict[str, Any], pictures: Sequence[str]) -> str:
    """The results as a page. pictures: file names beside it."""
    settings = identity["settings"]
    counts = {
        "text": f"{settings['text_rows']} windows",
        "recall": f"{settings['recall_count']} questions at each of {len(settings['depths'])} depths",
        "tracking": f"{settings['tracking_count']} chains of each of {', '.join(map(str, settings['hops']))} hops",
        "copy": f"{settings['copy_count']} copies of {settings['context'] // 2} tokens",
    }
    asked = {entry["task"] for entry in entries}
    parts = "; ".join(f"{task}: {count}" for task, count in counts.items() if task in asked)
    lines = [
        "# Quality against bytes",
        "",
        f"{about['model']}: {identity['parameters']:,} parameters, {identity['dtype']}; questions of "
        f"{settings['context']} tokens, {settings['batch']} at once, seed {settings['seed']}. {parts}. What follows "
        "a prompt goes through the decoding step, teacher forced; a prompt of text or copying is half of the context, "
        "one of recall or tracking nearly all. ± is the standard error over questions. Held are the bytes per sequence "
        "of pages in use in the live cache when a task ends (here text, or the first one run), scales included.",
        "",
        f"{machine_line(about)} Made by `{about['command']}`.{_busy(about)}",
        "",
        *_markdown_table(*table(entries)),
    ]
    for title, task, metric in (("Recall by depth", "recall", "by_depth"), ("Tracking by hops", "tracking", "by_hops")):
        if task in asked:
            lines += ["", f"## {title}", "", *_markdown_table(*by_kind(entries, task, metric))]
    for picture in pictures:
        lines += ["", f"![{picture.partition('.')[0].replace('_', ' ')}]({picture})"]
    return "\n".join([*lines, ""])


def _busy(about: dict[str, Any]) -> str:
    """A warning where other work shared the processor."""
    load, cores = about.get("load_before"), about.get("cores")
    if not load or not cores or load <= cores / 2:
        return ""
    return " The machine was busy with other work: tokens/s of different rows are not to be compared."


def _markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["--:"] * (len(titles) - 1)
    return [f"| {' | '.join(cells)} |".replace("| |", "|  |") for cells in (titles, rule, *lines)]


def _name(entry: Entry) -> str:
    return f"{entry['label']} {entry['point']}".strip()


def _by_row(entries: Sequence[Entry]) -> dict[str, dict[str, Entry]]:
    """Name -> task -> entry."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        found.setdefault(_name(entry), {})[entry["task"]] = entry
    return found


def _cell(column: Column, entry: Entry | None) -> str:
    return "" if entry is None else column.cell(entry)


def _share(entry: Entry, rows: dict[str, dict[str, Entry]]) -> str:
    """Of the bytes that the first row holds in the same task."""
    first = next(iter(rows.values())).get(entry["task"])
    return "" if first is None else f"{100 * entry['bytes']['held'] / first['bytes']['held']:.0f}%"
