"""
Compare emitter_anyio with other MQTT clients.

``python -m benchmarks`` runs everything, ``--quick`` takes two minutes, and ``--rows`` and
``--clients`` select. ``python -m nox -s bench -- ...`` runs it in a separate environment.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

from benchmarks import report
from benchmarks.environments import HERE, MissingError, python_of, requirements
from benchmarks.report import Results
from benchmarks.rows import CLIENTS, ROWS, Client, Row
from benchmarks.running import ROOT, Certificate, RunFailedError, run

BEGIN: Final = "<!-- the table begins -->"
END: Final = "<!-- the table ends -->"

_ROUNDS: Final = 9

_QUICK: Final = "us,gmqtt,mqttium,zmqtt,paho-asyncio,mosquitto"
"""The clients of a quick run: each of them is the fastest in at least one row."""

_LONG: Final = {"idle", "connections", "stalled", "import"}
"""The rows that always take long, so that they have fewer rounds, and in a quick run few peers."""

_LONG_ROUNDS: Final = 5

_HOW: Final = (
    "a client that was far from the fastest in the first round ran only once, as did the clients "
    "of rows whose goal does not refer to them"
)

_Named = TypeVar("_Named", Row, Client)


def chosen(every: Sequence[_Named], names: str | None, what: str) -> list[_Named]:
    """
    Select by name. ``fan-in`` and ``us`` also select ``fan-in-10`` and ``us-trio``.

    :raises SystemExit: if a name is unknown
    """
    if names is None:
        return list(every)
    wanted = [name.strip() for name in names.split(",")]

    def fits(one: _Named, name: str) -> bool:
        return one.name == name or one.name.startswith(f"{name}-")

    for name in wanted:
        if not any(fits(one, name) for one in every):
            known = ", ".join(one.name for one in every)
            raise SystemExit(f"unknown {what} {name!r}: expected one of {known}")
    return [one for one in every if any(fits(one, name) for name in wanted)]


def about(clients: Iterable[Client], rounds: int, quick: bool) -> dict[str, str]:
    """Describe the machine, the date and the versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        check=False,
        text=True,
    )
    peers = {client.environment: requirements(client.environment)[0]
             for client in clients if client.environment}  # fmt: skip
    versions = [f"{name} {version(name)}" for name in ("anyio", "trio", "paho-mqtt")]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{model}, {os.cpu_count()} processors, {platform.system()}",
        # From about 0.5, other processes have slowed down the rates, but not the CPU column.
        "load before the run": f"{os.getloadavg()[0]:.1f}"
        if hasattr(os, "getloadavg")
        else "unknown",
        "Python": platform.python_version(),
        "emitter_anyio": ", ".join(
            [f"{version('emitter_anyio')} {commit.stdout.strip()}", *versions]
        ),
        "peers": ", ".join(peers.values()) or "none",
        "rounds": f"{rounds}; {'a quick run, too few for a verdict' if quick else _HOW}",
    }


def measure(
    rows: Sequence[Row],
    clients: Sequence[Client],
    lasting: Sequence[Client],
    rounds: int,
    *,
    quick: bool,
    all_take_part: bool,
    results: Results,
) -> None:
    """
    Run all rounds. Each round runs each row in turn, with each of its clients.

    :param lasting: the clients of the rows that always take long
    :param all_take_part: whether clients that were far from the fastest in the first round take
        part in the other rounds
    """
    pythons: dict[str, str] = {}
    for client in clients:
        try:
            pythons[client.name] = python_of(client)
        except MissingError as exc:
            print(f"left out: {exc}", file=sys.stderr)
            results.about.setdefault("left out", "")
            results.about["left out"] += f"{client.name} "
    with tempfile.TemporaryDirectory() as directory:
        certificate = Certificate.make(Path(directory))
        for number in range(rounds):
            for row in rows:
                long = row.name in _LONG
                if long and number >= _LONG_ROUNDS:
                    continue
                near = report.near_the_fastest(results, row)
                taking_part = [
                    client
                    for client in (lasting if long else clients)
                    if client.name in pythons
                    and row.runs_on(client)
                    and (not number or all_take_part or client.ours or client.name in near)
                ]
                more: dict[str, Any] = {}
                if row.case == "idle":
                    more["seconds"] = 2.0 if quick else 3.0
                secure = certificate if row.needs == "tls" else None
                messages = row.quick if quick else row.messages
                for client in taking_part:
                    print(f"{number + 1}/{rounds} {row.name} {client.name}: ",
                          end="", file=sys.stderr, flush=True)  # fmt: skip
                    try:
                        python = pythons[client.name]
                        figures = run(row, client, python, messages, secure, **more)
                    except RunFailedError as exc:
                        results.fail(row.name, client.name, f"failed: {exc}")
                        print(f"failed: {exc}", file=sys.stderr)
                    else:
                        results.add(row.name, client.name, figures)
                        shown = (
                            f"{report.amount(value, 2)} {key}" for key, value in figures.items()
                        )
                        print(", ".join(shown), file=sys.stderr)


def into_docs(path: Path, table: str) -> None:
    """Replace the table between the two marks."""
    text = path.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{table}{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", help="names of rows, separated by commas")
    parser.add_argument("--clients", help="names of clients, separated by commas")
    parser.add_argument(
        "--rounds", type=int, help=f"the number of rounds; default: {_ROUNDS}, or 1 with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="run one round with fewer messages")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results", help="the directory for the results"
    )
    parser.add_argument(
        "--docs", action="store_true", help="write the tables into docs/ and the README"
    )
    parser.add_argument("--again", type=Path, help="report on this results.json without a run")
    arguments = parser.parse_args()

    quick = arguments.quick
    rounds = arguments.rounds or (1 if quick else _ROUNDS)
    results = Results()
    if arguments.again:
        results = Results(**json.loads(arguments.again.read_text()))
    else:
        names = arguments.clients or (_QUICK if quick else None)
        clients = chosen(CLIENTS, names, "client")
        lasting = clients
        if quick and arguments.clients is None:
            clients = [client for client in clients if client.ours or not client.uvloop]
            lasting = [client for client in clients if client.ours or client.name == "gmqtt"]
        results.about = about(clients, rounds, quick)
        try:
            rows = chosen(ROWS, arguments.rows, "row")
            measure(
                rows,
                clients,
                lasting,
                rounds,
                quick=quick,
                all_take_part=arguments.clients is not None,
                results=results,
            )
        except KeyboardInterrupt:
            results.about["note"] = "stopped before the end"
    table = report.markdown(results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(asdict(results), indent=1))
    (arguments.output / "results.md").write_text(table)
    plots = [arguments.output / "results.svg"]
    if arguments.docs:
        into_docs(ROOT / "docs" / "benchmarks.md", table)
        into_docs(ROOT / "README.md", report.summary(results))
        plots.append(ROOT / "docs" / "benchmarks.svg")
    for path in plots:
        report.plot(results.medians(), path)
    print(table)


if __name__ == "__main__":
    main()
