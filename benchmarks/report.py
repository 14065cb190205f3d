"""Medians, ratios, goals, tables and a plot. Only the plot writes a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final, TypeAlias

from benchmarks.rows import CLIENTS, P50, RATE, ROWS, Client, Figure, Goal, Row

_RATIOS: Final = (
    "Ratios refer to the fastest Python peer of the row in the same run. Peers on uvloop are "
    "compared with emitter_anyio on uvloop only."
)

_SUMMARY: Final = (
    ("receive", RATE, "receive, messages/s"),
    ("publish", RATE, "publish, messages/s"),
    ("confirmed-20", RATE, "publish QoS 1, 20 in flight, messages/s"),
    ("round-trip", P50, "round trip, µs"),
    ("connect", P50, "connect and close, µs"),
)
_SUMMARIZED: Final = ("us-asyncio", "us-trio", "emitter-io", "mosquitto")

_FAR: Final = 3.0
"""How many times slower than the fastest a client must be to need no further rounds."""

Medians: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""The median of each figure, by row and client."""

_CLIENTS: Final = {client.name: client for client in CLIENTS}
_OURS: Final = tuple(client for client in CLIENTS if client.ours)


@dataclass
class Results:
    """
    The figures of a whole run.

    :ivar about: machine, date and versions
    :ivar runs: the figures of each round, by row and client
    :ivar failures: the reason for missing figures, by row and client
    """

    about: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, row: str, client: str, figures: dict[str, float]) -> None:
        """Add the figures of a run."""
        self.runs.setdefault(row, {}).setdefault(client, []).append(figures)

    def fail(self, row: str, client: str, why: str) -> None:
        """Record that one run failed."""
        self.failures.setdefault(row, {})[client] = why

    def medians(self) -> Medians:
        """Return the median of each figure."""
        return {
            row: {
                client: {key: median(run[key] for run in runs) for key in runs[0]}
                for client, runs in clients.items()
            }
            for row, clients in self.runs.items()
        }


@dataclass(frozen=True)
class Verdict:
    """
    A goal and what one variant of emitter_anyio reached.

    :ivar value: the figure, or ``None`` if it is missing
    :ivar reference: the client or row that it is compared with, or an empty string
    :ivar ratio: ``value`` divided by the figure of ``reference``, or ``value`` without a reference
    :ivar met: ``None`` if the reference is missing
    """

    row: Row
    goal: Goal
    client: Client
    value: float | None
    reference: str
    ratio: float | None
    met: bool | None


def fastest(
    measured: Mapping[str, Mapping[str, float]], figure: Figure, beside: Client
) -> tuple[str, float] | None:
    """
    Find the best Python peer of a row.

    :param beside: the variant of emitter_anyio; it is compared with peers on uvloop only if it
        runs on uvloop
    """
    peers = {
        name: figures[figure.key]
        for name, figures in measured.items()
        if figure.key in figures
        and (client := _CLIENTS[name]).python
        and not client.ours
        and (beside.uvloop or not client.uvloop)
    }
    if not peers:
        return None
    best = (max if figure.higher else min)(peers, key=lambda name: peers[name])
    return best, peers[best]


def near_the_fastest(results: Results, row: Row) -> set[str]:
    """Return the clients that might be the fastest, if a goal of the row refers to them."""
    if not {goal.against for goal in row.goals} & {"fastest", "mosquitto"}:
        return set()
    figure = row.figures[0]
    firsts = {name: runs[0] for name, runs in results.runs.get(row.name, {}).items()}
    best = fastest(firsts, figure, _CLIENTS["us-uvloop"])
    if best is None:
        return set()
    return {
        name
        for name, figures in firsts.items()
        if (
            figures[figure.key] * _FAR >= best[1]
            if figure.higher
            else figures[figure.key] <= best[1] * _FAR
        )
    }


def judge(medians: Medians, rows: Iterable[Row] = ROWS) -> list[Verdict]:
    """Compare the figures with the goals."""
    return [
        _verdict(medians, row, goal, client)
        for row in rows
        if row.name in medians
        for goal in row.goals
        for client in _OURS
        if client.name in medians[row.name]
    ]


def _verdict(medians: Medians, row: Row, goal: Goal, client: Client) -> Verdict:
    measured = medians[row.name]
    value = measured[client.name].get(goal.figure.key)
    if goal.against == "nothing":
        beside = ("", 1.0)
    elif goal.against == "fastest":
        beside = fastest(measured, goal.figure, client) or ("", math.nan)
    elif goal.against == "mosquitto":
        figures = measured.get("mosquitto", {})
        beside = ("mosquitto", figures.get(goal.figure.key, math.nan))
    else:
        figures = medians.get(goal.row, {}).get(client.name, {})
        beside = (goal.row, figures.get(goal.figure.key, math.nan))
    ratio = None if value is None or math.isnan(beside[1]) else value / beside[1]
    met: bool | None = None
    if ratio is not None:
        met = ratio >= goal.bound if goal.figure.higher else ratio <= goal.bound
    return Verdict(row, goal, client, value, beside[0], ratio, met)


def amount(value: float, digits: int = 0) -> str:
    """Format a number with about three digits."""
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    if value >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}"


def _bound(goal: Goal) -> str:
    sense = "≥" if goal.figure.higher else "≤"
    if goal.against == "nothing":
        return f"{sense} {goal.bound:g}"
    reference = {
        "fastest": "the fastest Python peer",
        "mosquitto": "mosquitto's tool",
        "row": f"`{goal.row}`",
    }[goal.against]
    return f"{sense} {goal.bound:g} × {reference}"


def _reached(verdict: Verdict) -> str:
    if verdict.value is None:
        return "–"
    text = amount(verdict.value, verdict.goal.figure.digits)
    if verdict.ratio is not None and verdict.goal.against != "nothing":
        text += f" ({verdict.ratio:.2f} ×"
        text += f" {verdict.reference})" if verdict.goal.against == "fastest" else ")"
    return text + {True: " ✓", False: " ✗", None: " ?"}[verdict.met]


def goals_table(verdicts: Sequence[Verdict]) -> str:
    """Return a table of the goals with the figures of each variant."""
    ours = [client for client in _OURS if any(v.client is client for v in verdicts)]
    head = ["row", "figure", "goal", *(client.title for client in ours)]
    lines = []
    for row, goal in dict.fromkeys((v.row, v.goal) for v in verdicts):
        reached = {v.client: _reached(v) for v in verdicts if (v.row, v.goal) == (row, goal)}
        cells = [reached.get(client, "–") for client in ours]
        lines.append([row.title, goal.figure.title, _bound(goal), *cells])
    return _table(head, lines)


def row_table(row: Row, measured: Mapping[str, Mapping[str, float]], why: Mapping[str, str]) -> str:
    """Return a table of one row with a line for each client, the best one first."""
    main = row.figures[0]
    best = fastest(measured, main, _CLIENTS["us-uvloop"])
    names = sorted(
        measured,
        key=lambda name: measured[name].get(main.key, math.inf if not main.higher else 0),
        reverse=main.higher,
    )
    lines = []
    for name in names:
        figures = measured[name]
        cells = [
            amount(figures[each.key], each.digits) if each.key in figures else "–"
            for each in row.figures
        ]
        ratio = "–" if best is None or not best[1] else f"{figures[main.key] / best[1]:.2f}"
        lines.append([_CLIENTS[name].title, *cells, ratio])
    lines += [[name, reason, *[""] * len(row.figures)] for name, reason in why.items()]
    head = ["client", *(each.title for each in row.figures), "ratio to the fastest Python peer"]
    return _table(head, lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def markdown(results: Results) -> str:
    """Return the whole report."""
    medians = results.medians()
    verdicts = judge(medians)
    met, missed = (sum(v.met is outcome for v in verdicts) for outcome in (True, False))
    about = "; ".join(f"{name}: {text}" for name, text in results.about.items())
    parts = [f"{about}."]
    if verdicts:
        parts += [f"Goals met: {met}, not met: {missed}. {_RATIOS}", goals_table(verdicts)]
    for row in ROWS:
        measured, why = medians.get(row.name, {}), results.failures.get(row.name, {})
        if measured or why:
            parts += [f"**{row.title}** (`{row.name}`)", row_table(row, measured, why)]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """Return a table of the most important figures, with machine and date."""
    medians = results.medians()
    lines = []
    for row, figure, title in _SUMMARY:
        clients = medians.get(row, {})
        measured = {
            name: figures[figure.key] for name, figures in clients.items() if figure.key in figures
        }
        cells = [amount(measured[name]) if name in measured else "–" for name in _SUMMARIZED]
        best = fastest(clients, figure, _CLIENTS["us-asyncio"])
        cells.insert(2, "–" if best is None else f"{amount(best[1])} ({best[0]})")
        lines.append([title, *cells])
    about = results.about
    head = [
        f"{about.get('date', '')}, {about.get('machine', '')}, Python {about.get('Python', '')}",
        *(
            "emitter_anyio, asyncio",
            "emitter_anyio, Trio",
            "fastest other in Python",
            "emitter-io 2.3",
        ),
        "mosquitto's tools",
    ]
    return _table(head, lines) + "\n"


def plot(medians: Medians, path: Path) -> None:
    """Draw the figures of the summary as SVG, a panel for each with a bar for each client."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "emitter_anyio"
    from matplotlib import pyplot

    summary = [(row, figure, title) for row, figure, title in _SUMMARY if medians.get(row)]
    if not summary:
        return
    picture, panels = pyplot.subplots(
        len(summary), 1, figsize=(8, 1.7 * len(summary)), squeeze=False
    )
    for panel, (row, figure, title) in zip(panels.flat, summary, strict=True):
        measured = {
            name: figures[figure.key]
            for name, figures in medians[row].items()
            if figure.key in figures
        }
        best = fastest(medians[row], figure, _CLIENTS["us-asyncio"])
        shown = [*_SUMMARIZED[:2], *([best[0]] if best else []), *_SUMMARIZED[2:]]
        names = [name for name in dict.fromkeys(shown) if name in measured]
        names.reverse()
        colours = ["tab:orange" if _CLIENTS[name].ours else "tab:gray" for name in names]
        titles = [_CLIENTS[name].title for name in names]
        bars = panel.barh(titles, [measured[name] for name in names], color=colours)
        panel.bar_label(bars, [f" {amount(measured[name])}" for name in names], fontsize=9)
        panel.margins(x=0.15)
        better = "higher" if figure.higher else "lower"
        panel.set_title(f"{title} ({better} is better)", fontsize=10, loc="left")
        panel.tick_params(labelsize=9)
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    picture.tight_layout()
    picture.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(picture)
