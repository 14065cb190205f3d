"""
Simulate a fleet of clients that lose their broker, in virtual time.

``python -m benchmarks.fleets --help`` lists the options. All clients run in this process, over
in-memory connections to development brokers, so a run needs no sockets and does not wait.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import random
import sys
import time
from bisect import bisect
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import anyio
from anyio.abc import ByteStream, ByteStreamConnectable

from emitter_anyio import Backoff, connect
from emitter_anyio.testing import Broker, run_virtual

ROOT = Path(__file__).parent.parent

Outage: TypeAlias = Literal["away", "node", "keys", "slow"]

CHANNEL = "fleet/"
KEY_SECONDS = 3600
"""The lifetime of the first keys in the outage ``keys``."""
KEY_REQUEST_SECONDS = 0.05
"""The time in which the simulated key server makes a key."""


@dataclass(frozen=True)
class Plan:
    """
    What to simulate.

    :ivar clients: the number of clients
    :ivar outage: ``"away"`` (the broker is down), ``"node"`` (one node of three is lost),
        ``"keys"`` (the broker is down while all keys expire) or ``"slow"`` (the broker is down, and
        then handles few requests per second)
    :ivar seconds: the length of the outage; a lost node stays away
    :ivar rate: the requests per second that the broker handles after the outage ``slow``
    :ivar backoff: the ``Backoff`` of each client
    :ivar patience: the seconds after the outage in which all clients must be restored
    :ivar seed: the seed of the delays. On asyncio, a run with the same seed gives the same figures
    :ivar backend: the backend
    """

    clients: int = 500
    outage: Outage = "away"
    seconds: float = 10
    rate: float = 100
    backoff: Backoff = field(default_factory=Backoff)
    patience: float = 3600
    seed: int = 1
    backend: Literal["asyncio", "trio"] = "asyncio"


@dataclass(frozen=True)
class Result:
    """
    What happened. Times are in seconds since the start of the outage.

    :ivar plan: what was simulated
    :ivar tries: the time of each try to connect
    :ivar lost: the number of clients that lost their connection
    :ivar restored: the time at which each of them was restored
    :ivar key_requests: the time of each call of a key function
    :ivar forgotten: the clients that did not receive a message after the outage
    :ivar bytes_connected: the memory per client before the outage, with the broker's half
    :ivar bytes_restored: the same after the outage
    :ivar wall_seconds: how long the simulation took
    """

    plan: Plan
    tries: list[float]
    lost: int
    restored: list[float]
    key_requests: list[float]
    forgotten: int
    bytes_connected: float
    bytes_restored: float
    wall_seconds: float

    @property
    def back_at(self) -> float:
        """The time at which every client has a broker that accepts it."""
        return 0 if self.plan.outage == "node" else self.plan.seconds

    @property
    def peak(self) -> int:
        """The largest number of tries within a second."""
        return peak(self.tries)

    @property
    def peak_after(self) -> int:
        """The largest number of tries within a second after the broker is back."""
        return peak([when for when in self.tries if when >= self.back_at])

    @property
    def last_restored(self) -> float:
        """The seconds from the broker's return until every client is restored."""
        return max(self.restored, default=0) - self.back_at

    @property
    def half_restored(self) -> float:
        """The seconds from the broker's return until half of the clients are restored."""
        return sorted([0.0, *self.restored])[(len(self.restored) + 1) // 2] - self.back_at

    @property
    def complete(self) -> bool:
        """Whether every client was restored and received the message after the outage."""
        return len(self.restored) == self.lost and not self.forgotten

    def summary(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            **asdict(self.plan),
            "lost": self.lost,
            "restored": len(self.restored),
            "tries": len(self.tries),
            "peak": self.peak,
            "peak_after": self.peak_after,
            "half_restored": round(self.half_restored, 2),
            "last_restored": round(self.last_restored, 2),
            "key_requests": len(self.key_requests),
            "peak_key_requests": peak(self.key_requests),
            "forgotten": self.forgotten,
            "bytes_connected": round(self.bytes_connected),
            "bytes_restored": round(self.bytes_restored),
            "wall_seconds": round(self.wall_seconds, 1),
        }


def peak(times: Sequence[float]) -> int:
    """Return the largest number of times within one second."""
    times = sorted(times)
    most = first = 0
    for last, when in enumerate(times):
        while times[first] <= when - 1:
            first += 1
        most = max(most, last - first + 1)
    return most


class Nodes(ByteStreamConnectable):
    """
    Connects one client to the nodes in turn, as the option ``servers`` does.

    :param nodes: the connectables of the nodes, the first one first
    :param tried: called for each try
    """

    def __init__(self, nodes: Sequence[ByteStreamConnectable], tried: Callable[[], None]) -> None:
        self._nodes = nodes
        self._tried = tried
        self._next = 0

    async def connect(self) -> ByteStream:
        failure: OSError | None = None
        for _ in self._nodes:
            node = self._nodes[self._next % len(self._nodes)]
            self._next += 1
            self._tried()
            try:
                return await node.connect()
            except OSError as exc:
                failure = exc
        assert failure is not None
        raise failure


class Fleet:
    """Runs the clients of a plan, and records what they do."""

    def __init__(self, plan: Plan, nodes: Sequence[Broker]) -> None:
        self.plan = plan
        self.nodes = nodes
        self.tries: list[float] = []
        self.key_requests: list[float] = []
        self.connected: dict[int, float] = {}
        """The time at which each connected client was last restored."""
        self.received: set[int] = set()
        """The clients that have received a message."""
        self._ready = 0
        self._changed = anyio.Event()
        self._connectables = [node.connectable() for node in nodes]
        self._key = nodes[0].keygen(CHANNEL, "r")

    async def key(self) -> str:
        """Return a key, as a key server does."""
        self.key_requests.append(anyio.current_time())
        await anyio.sleep(KEY_REQUEST_SECONDS)
        if len(self.key_requests) > self.plan.clients:
            return self._key
        return self.nodes[0].keygen(CHANNEL, "r", KEY_SECONDS)

    async def run_client(self, number: int) -> None:
        """Run one client until it is cancelled."""
        home = number % len(self.nodes)
        nodes = [*self._connectables[home:], *self._connectables[:home]]
        emitter = connect(
            connectable=Nodes(nodes, self._note_try),
            client_id=f"device-{number}",
            reconnect=self.plan.backoff,
        )
        emitter.on("connect", partial(self._note_connect, number))
        emitter.on("disconnect", partial(self._note_disconnect, number))
        key = self.key if self.plan.outage == "keys" else self._key
        async with emitter, emitter.subscribe(key, CHANNEL) as messages:
            self._ready += 1
            self._change()
            async for _ in messages:
                self.received.add(number)
                self._change()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, within the plan's patience."""
        with anyio.move_on_after(self.plan.patience):
            while not condition():
                await self._changed.wait()

    def is_ready(self) -> bool:
        return self._ready == self.plan.clients

    def is_connected(self) -> bool:
        return len(self.connected) == self.plan.clients

    def has_received(self) -> bool:
        return len(self.received) == self.plan.clients

    def _note_try(self) -> None:
        self.tries.append(anyio.current_time())

    def _note_connect(self, number: int) -> None:
        self.connected[number] = anyio.current_time()
        self._change()

    def _note_disconnect(self, number: int) -> None:
        self.connected.pop(number, None)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


async def simulate(plan: Plan) -> Result:
    """Run a plan; to be called in virtual time."""
    random.seed(plan.seed)
    began, memory = time.perf_counter(), resident_bytes()
    async with running_nodes(3 if plan.outage == "node" else 1) as nodes:
        fleet = Fleet(plan, nodes)
        async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
            for number in range(plan.clients):
                tasks.start_soon(fleet.run_client, number)
            await fleet.until(fleet.is_ready)
            await anyio.sleep(15)  # after 10 seconds, a loss restarts the back-off
            connected = resident_bytes() - memory
            fleet.tries.clear()
            keys, start = len(fleet.key_requests), anyio.current_time()

            await nodes[0].stop()
            await anyio.wait_all_tasks_blocked()
            lost = plan.clients - len(fleet.connected)
            if plan.outage == "keys":
                nodes[0].advance(KEY_SECONDS)
            if plan.outage == "slow":
                stack.enter_context(nodes[0].throttle(plan.rate))
            if plan.outage != "node":
                await anyio.sleep(start + plan.seconds - anyio.current_time())
                await nodes[0].restart()
            await fleet.until(fleet.is_connected)
            restored = resident_bytes() - memory

            await nodes[-1].publish(CHANNEL, "are you there?")
            await fleet.until(fleet.has_received)
            tasks.cancel_scope.cancel()
    return Result(
        plan,
        [when - start for when in fleet.tries],
        lost,
        [when - start for when in fleet.connected.values() if when >= start],
        [when - start for when in fleet.key_requests[keys:]],
        plan.clients - len(fleet.received),
        connected / plan.clients,
        restored / plan.clients,
        time.perf_counter() - began,
    )


@asynccontextmanager
async def running_nodes(count: int) -> AsyncIterator[list[Broker]]:
    """Run a broker, or the nodes of a cluster."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(Broker())
        others = [await stack.enter_async_context(Broker(cluster=first)) for _ in range(count - 1)]
        yield [first, *others]


def resident_bytes() -> int:
    """Return the memory of this process; 0 if the system does not report it as Linux does."""
    gc.collect()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def run(plan: Plan) -> Result:
    """Run a plan in virtual time."""
    logging.getLogger("emitter_anyio").setLevel(logging.CRITICAL)
    gc.disable()  # with millions of objects, each full collection takes a second
    try:
        return run_virtual(simulate, plan, backend=plan.backend)
    finally:
        gc.enable()


PLANS: Final = [
    Plan(100),
    Plan(10_000),
    Plan(10_000, backoff=Backoff(spread=20)),
    Plan(10_000, "node"),
    Plan(10_000, "node", backoff=Backoff(spread=20)),
    Plan(10_000, "keys", backoff=Backoff(spread=20)),
    Plan(100, "slow"),
    Plan(1_000, "slow", rate=10, patience=300),
    Plan(10_000, "slow", backoff=Backoff(spread=400)),
]
"""The plans of ``docs/fleets.md``."""


def run_all(plans: Sequence[Plan]) -> list[Result]:
    """Run each plan in a new process, because a plan leaves memory behind."""
    results = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for result in pool.map(run, plans):
            print(json.dumps(result.summary()), flush=True)
            results.append(result)
    return results


def table(results: Sequence[Result]) -> str:
    """Return the figures as a table in Markdown."""
    columns = (
        *("clients", "outage", "`Backoff`"),
        *("most tries in 1 s", "half restored after", "all restored after"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        plan = result.plan
        everyone = f"{result.last_restored:.1f} s"
        if not result.complete:
            everyone = f"{len(result.restored):,} after {plan.patience:g} s"
        lines.append(
            f"| {plan.clients:,} | {plan.outage} | `{_call(plan.backoff)}` | {result.peak:,} "
            f"| {result.half_restored:.1f} s | {everyone} |"
        )
    return "\n".join(lines)


def _call(backoff: Backoff) -> str:
    given = [
        f"{name}={value:g}"
        for name, value in asdict(backoff).items()
        if value != getattr(Backoff(), name)
    ]
    return f"Backoff({', '.join(given)})"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the tries per second and the restored clients over time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "emitter_anyio"
    from matplotlib import pyplot

    picture, panels = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True)
    for result, colour in zip(results, ("tab:gray", "tab:orange"), strict=True):
        end = int(max(result.restored)) + 2
        seconds = range(end)
        counts = [0] * end
        for when in result.tries:
            counts[int(when)] += 1
        label = _call(result.plan.backoff)
        panels[0].step(seconds, counts, where="post", color=colour, label=label)
        restored = sorted(result.restored)
        shares = [100 * bisect(restored, when) / len(restored) for when in seconds]
        panels[1].plot(seconds, shares, color=colour, label=label)
    panels[0].set_yscale("log")
    panels[0].set_title("tries to connect in each second", fontsize=10, loc="left")
    panels[1].set_title("% of the clients restored", fontsize=10, loc="left")
    panels[1].set_xlabel("seconds since the connections were lost", fontsize=9)
    for panel in panels:
        panel.axvspan(0, results[0].back_at, color="tab:blue", alpha=0.1)
        panel.legend(fontsize=9)
        panel.tick_params(labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    picture.tight_layout()
    picture.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(picture)


def parse_backoff(text: str) -> Backoff:
    """Parse for example ``initial=1,maximum=60,spread=10``."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        values[name] = int(value) if name == "tries" else float(value)
    return Backoff(**values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan that the arguments describe, or the plans of the docs."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fleets", description="Simulate a fleet of clients in virtual time."
    )
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--outage", choices=get_args(Outage), default="away")
    parser.add_argument("--seconds", type=float, default=10, help="the length of the outage")
    parser.add_argument("--rate", type=float, default=100, help="requests per second, for slow")
    parser.add_argument(
        "--backoff", type=parse_backoff, default=Backoff(), metavar="spread=20,maximum=60"
    )
    parser.add_argument(
        "--patience", type=float, default=3600, help="the time to restore all clients in, seconds"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument(
        "--docs", action="store_true", help="measure the table and the plot of docs/fleets.md"
    )
    options = vars(parser.parse_args(arguments))
    if options.pop("docs"):
        results = run_all(PLANS)
        print(table(results))
        plot(results[1:3], ROOT / "docs" / "fleets.svg")
        return 0
    result = run(Plan(**options))
    print(json.dumps(result.summary()))
    return 0 if result.complete else 1


if __name__ == "__main__":
    sys.exit(main())
