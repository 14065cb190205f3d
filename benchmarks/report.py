"""From figures to medians, ratios, goals, a table and a plot. No I/O but for the plot's file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final, TypeAlias

from benchmarks.rows import CLIENTS, P50, RATE, ROWS, Client, Figure, Goal, Row

_RATIOS: Final = (
    "Ratios are to the fastest Python peer of the row in the same run; peers on uvloop stand "
    "beside us on uvloop only."
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
"""Noise has not made anybody so many times slower."""

Medians: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""By row, client and figure."""

_CLIENTS: Final = {client.name: client for client in CLIENTS}
_OURS: Final = tuple(client for client in CLIENTS if client.ours)


@dataclass
class Results:
    """
    What a whole run has measured.

    :ivar about: machine, date and versions
    :ivar runs: by row and client, the figures of each round
    :ivar failures: by row and client, why there are no figures
    """

    about: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, row: str, client: str, figures: dict[str, float]) -> None:
        """Add what one run has given."""
        self.runs.setdefault(row, {}).setdefault(client, []).append(figures)

    def fail(self, row: str, client: str, why: str) -> None:
        """Note that one run has given nothing."""
        self.failures.setdefault(row, {})[client] = why

    def medians(self) -> Medians:
        """The median of every figure."""
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
    Whether a goal is met by one client of ours.

    :ivar value: what was reached; ``None`` if there is no figure
    :ivar reference: who it is compared with, if with anybody
    :ivar ratio: ``value`` beside the figure of ``reference``; the value itself if there is none
    :ivar met: ``None`` if it cannot be told
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

    :param beside: one of ours; peers on uvloop stand beside us on uvloop only
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
    """Name those beside whom a row has a goal, and who may turn out to be the fastest of them."""
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
    """Hold what was reached against the goals."""
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
    """Write a number for people."""
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    if value >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}"


def _bound(goal: Goal) -> str:
    sense = "≥" if goal.figure.higher else "≤"
    if goal.against == "nothing":
        return f"{sense} {goal.bound:g}"
    whom = {
        "fastest": "the fastest Python peer",
        "mosquitto": "mosquitto's tool",
        "row": f"`{goal.row}`",
    }[goal.against]
    return f"{sense} {goal.bound:g} × {whom}"


def _reached(verdict: Verdict) -> str:
    if verdict.value is None:
        return "–"
    text = amount(verdict.value, verdict.goal.figure.digits)
    if verdict.ratio is not None and verdict.goal.against != "nothing":
        text += f" ({verdict.ratio:.2f} ×"
        text += f" {verdict.reference})" if verdict.goal.against == "fastest" else ")"
    return text + {True: " ✓", False: " ✗", None: " ?"}[verdict.met]


def goals_table(verdicts: Sequence[Verdict]) -> str:
    """Lay out the goals, with what each of our clients has reached."""
    ours = [client for client in _OURS if any(v.client is client for v in verdicts)]
    head = ["row", "figure", "goal", *(client.name for client in ours)]
    lines = []
    for row, goal in dict.fromkeys((v.row, v.goal) for v in verdicts):
        reached = {v.client: _reached(v) for v in verdicts if (v.row, v.goal) == (row, goal)}
        cells = [reached.get(client, "–") for client in ours]
        lines.append([row.title, goal.figure.title, _bound(goal), *cells])
    return _table(head, lines)


def row_table(row: Row, measured: Mapping[str, Mapping[str, float]], why: Mapping[str, str]) -> str:
    """Lay out one row: a line for each client, the best first, and its ratio to the best peer."""
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
        lines.append([name, *cells, ratio])
    lines += [[name, reason, *[""] * len(row.figures)] for name, reason in why.items()]
    head = ["client", *(each.title for each in row.figures), "× the best Python peer"]
    return _table(head, lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def markdown(results: Results) -> str:
    """Write it all down."""
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
    """Lay out a row for each of the figures that most people look for, with machine and date."""
    medians = results.medians()
    lines = []
    for row, figure, title in _SUMMARY:
        clients = medians.get(row, {})
        measured = {
            name: figures[figure.key] for name, figures in clients.items() if figure.key in figures
        }
        told = [amount(measured[name]) if name in measured else "–" for name in _SUMMARIZED]
        best = fastest(clients, figure, _CLIENTS["us-asyncio"])
        told.insert(2, "–" if best is None else f"{amount(best[1])} ({best[0]})")
        lines.append([title, *told])
    about = results.about
    head = [
        f"{about.get('date', '')}, {about.get('machine', '')}, Python {about.get('Python', '')}",
        *("here, asyncio", "here, Trio", "fastest other in Python", "emitter-io 2.3"),
        "mosquitto's tools",
    ]
    return _table(head, lines) + "\n"


def plot(medians: Medians, path: Path) -> None:
    """Draw the rates of all clients as SVG, a panel for each row."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "emitter_anyio"
    from matplotlib import pyplot

    rows = [
        row
        for row in ROWS
        if row.figures[0] is RATE and row.case != "fan_in" and medians.get(row.name)
    ]
    if not rows:
        return
    high = math.ceil(len(rows) / 3)
    figure, panels = pyplot.subplots(high, 3, figsize=(11, 2.3 * high), squeeze=False)
    for panel, row in zip(panels.flat, rows, strict=False):
        rates = {name: figures[RATE.key] for name, figures in medians[row.name].items()}
        names = sorted(rates, key=lambda name: rates[name])
        colours = ["tab:orange" if _CLIENTS[name].ours else "tab:gray" for name in names]
        bars = panel.barh(names, [rates[name] for name in names], color=colours)
        panel.bar_label(bars, [f" {amount(rates[name])}" for name in names], fontsize=6)
        panel.margins(x=0.15)
        panel.set_title(row.name, fontsize=9)
        panel.tick_params(labelsize=6)
        panel.set_xticks([])
    for panel in panels.flat[len(rows) :]:
        panel.set_axis_off()
    figure.suptitle("messages per second", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
