"""
Run many clients against a failing network and broker; check for lost messages and leaks.

``python -m tests.soak --help`` lists the options. The broker runs in a separate process that is
killed at random times and restarts immediately or seconds later, without its stored messages. The
clients connect through proxies that cut and stall connections. A few clients share each channel;
every client publishes to its channel and subscribes to it in three ways. The run writes a journal,
from which ``accounting.py`` works out which messages had to arrive.

With ``--cluster``, the clients connect to the nodes of ``EMITTER_CLUSTER`` (see
``CONTRIBUTING.md``). Nodes are killed, suspended and cut off, and after each fault all of them are
stopped and started again. They must keep their stored messages.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import anyio
from anyio import to_thread

from emitter_anyio.testing import Broker
from tests.cluster.driver import FAULTS, Cluster, cluster_from_environment
from tests.support.leaks import running_tasks

from .accounting import Account, Accounting
from .client import HUNG_SECONDS, Client, Run
from .processes import BrokerProcess, NetworkProcess

PROXIES: Final = 8
CLIENTS_PER_CHANNEL: Final = 4
"""The clients of a channel connect through different proxies."""
MAX_RSS_RATIO: Final = 1.25
"""The allowed ratio of RSS at the end to RSS when warm; fragmentation needs some margin."""
MAX_BLOCKS_RATIO: Final = 1.1
"""The allowed ratio of Python's memory blocks, which fragmentation does not affect."""
MEMORY_CHECK_SECONDS: Final = 60.0
"""The length of a run from which memory is checked; a shorter one ends before it is warm."""
WARM_UP_FRACTION: Final = 0.3
"""The first part of a run, in which memory grows while caches fill and faults first occur."""
if sys.platform == "win32":
    _PAGE: Final = 4096
else:
    _PAGE: Final = os.sysconf("SC_PAGE_SIZE")


Disturbed: TypeAlias = BrokerProcess | Cluster
"""What faults are injected into, apart from the network."""


class Network:
    """
    Proxies, each in front of the next node.

    :param ports: the ports of the nodes
    """

    def __init__(self, ports: list[int]) -> None:
        self._processes = [NetworkProcess(port, PROXIES // len(ports)) for port in ports]
        self.ports = [
            port
            for row in zip(*(process.ports for process in self._processes), strict=True)
            for port in row
        ]

    def send(self, number: int, method: str, *arguments: object) -> None:
        """Make a proxy call a method of ``FaultProxy``."""
        row, node = divmod(number, len(self._processes))
        self._processes[node].send(row, method, *arguments)

    def end(self) -> None:
        """End all proxies."""
        for process in self._processes:
            process.end()


class Sample(NamedTuple):
    """The resources of this process at one moment."""

    time: float
    rss: float
    """In MiB."""
    blocks: int
    """Memory blocks that Python has allocated."""
    descriptors: int
    tasks: int
    connected: int


class _IncompleteResumptions(logging.Handler):
    """Record incomplete resumptions for handlers, which only the log reports."""

    def __init__(self, run: Run) -> None:
        super().__init__(logging.WARNING)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("resumed %r incompletely") and isinstance(record.args, tuple):
            self._run.note("W", record.args[0])


class Soak:
    """A run on one backend."""

    def __init__(
        self, options: argparse.Namespace, run: Run, broker: Disturbed, network: Network
    ) -> None:
        self.run = run
        self.faults: dict[str, int] = {}
        self.samples: list[Sample] = []
        self.connections = 0
        self._seconds: float = options.seconds
        self._broker = broker
        self._network = network
        self._random = random.Random(f"{options.seed} faults")
        members = [
            sum(i % run.rooms == room for i in range(options.clients)) for room in range(run.rooms)
        ]
        self._clients = [Client(run, i, members[i % run.rooms]) for i in range(options.clients)]

    async def __call__(self) -> None:
        """Run all clients to their end, and check what they leave behind."""
        # Create what a process creates once, such as the worker threads for name look-ups.
        await to_thread.run_sync(int)
        before = self._sample()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_resources, tasks.cancel_scope)
            async with anyio.create_task_group() as clients:
                for client in self._clients:
                    clients.start_soon(client.live, name=f"client {client.index}")
                await self._inject_faults()
                self.run.quiet.set()
                await self._wait_steady()
                self.samples.append(self._sample())
                self.run.steady.set()
            tasks.cancel_scope.cancel()
        self.connections = sum(client.emitter.statistics().connections for client in self._clients)
        for client in self._clients:
            figures = client.emitter.statistics()
            if figures.pending or figures.queued_bytes or figures.nonsense:
                self.run.breach(f"client {client.index} ends with {figures}")
        gc.collect()
        after = self._sample()
        for what, was, now in (
            ("descriptors", before.descriptors, after.descriptors),
            ("tasks", before.tasks, after.tasks),
        ):
            if now != was:
                self.run.breach(f"{what}: {was} before the run, {now} after it")
        self._check_memory()

    # Faults

    async def _inject_faults(self) -> None:
        with anyio.move_on_after(self._seconds):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(
                    self._disturb_nodes if isinstance(self._broker, Cluster) else self._kill_broker
                )
                while True:
                    await anyio.sleep(self._random.expovariate(1 / 3))
                    tasks.start_soon(
                        self._inject_fault, self._random.randrange(len(self._network.ports))
                    )
        for proxy in range(len(self._network.ports)):
            self._network.send(proxy, "resume")
        if isinstance(self._broker, BrokerProcess):
            await to_thread.run_sync(self._broker.start)

    async def _disturb_nodes(self) -> None:
        cluster = self._broker
        assert isinstance(cluster, Cluster)
        while True:
            await anyio.sleep(self._random.uniform(2, 15))
            fault = self._random.choice(list(FAULTS))
            node = self._random.randrange(len(cluster.urls))
            self._count(f"node {fault}")
            began = monotonic()
            # A repair that has begun must be completed, even if the run ends.
            with anyio.CancelScope(shield=True):
                await cluster.do(FAULTS[fault][0], node)
                await anyio.sleep(self._random.uniform(0.2, 5))
                await cluster.do(FAULTS[fault][1], node)
                await cluster.reset()
                waiting = set(self._clients)
                # If a client has raised an error, those that it ended never reconnect.
                while waiting and monotonic() < began + HUNG_SECONDS:
                    waiting = {
                        client
                        for client in waiting
                        if not client.subscribed or client.emitter.state != "connected"
                    }
                    await anyio.sleep(0.1)
                if waiting:
                    self.run.breach(f"{len(waiting)} clients have not reconnected")
                await anyio.sleep(1)
            self.run.note("X", f"{began:.4f}")

    async def _kill_broker(self) -> None:
        assert isinstance(self._broker, BrokerProcess)
        # Kill the broker early, so that the warm-up includes this fault.
        delay = 2.0
        while True:
            await anyio.sleep(delay)
            delay = self._random.uniform(5, 25)
            self._count("broker killed")
            began = monotonic()
            await to_thread.run_sync(self._broker.kill)
            self.run.note("K", f"{began:.4f}")
            await anyio.sleep(self._random.choice((0, self._random.uniform(0.2, 4))))
            await to_thread.run_sync(self._broker.start)

    async def _inject_fault(self, proxy: int) -> None:
        direction = self._random.choice(("to_broker", "to_client"))
        kind = self._random.choices(
            ("cut", "cut after some bytes", "half closed", "stalled", "stalled and cut", "silent"),
            (6, 4, 1, 3, 5, 1),
        )[0]
        self._count(kind)
        send = partial(self._network.send, proxy)
        if kind == "cut":
            send("cut")
        elif kind == "cut after some bytes":
            send("cut_after", self._random.randrange(4000), direction)
        elif kind == "half closed":
            send("half_close", direction)
        else:
            send("stall", self._random.choice((None, direction)))
            try:
                await anyio.sleep(12 if kind == "silent" else self._random.uniform(0.2, 3))
                if kind == "stalled and cut":
                    send("cut")
            finally:
                # A node is repaired at the end of the run until all clients have reconnected.
                send("resume")

    def _count(self, fault: str) -> None:
        self.faults[fault] = self.faults.get(fault, 0) + 1

    async def _wait_steady(self) -> None:
        quiet_since = monotonic()
        while monotonic() < quiet_since + 2:
            await anyio.sleep(0.1)
            if not all(c.subscribed and c.emitter.state == "connected" for c in self._clients):
                quiet_since = monotonic()

    # Resources

    async def _watch_resources(self, scope: anyio.CancelScope) -> None:
        delay = self._seconds + 300
        began = monotonic()
        while monotonic() < began + delay:
            self.samples.append(self._sample())
            await anyio.sleep(1)
        self.run.breach(f"the run has not ended after {delay:g} s")
        scope.cancel()

    def _sample(self) -> Sample:
        connected = sum(client.emitter.state == "connected" for client in self._clients)
        return Sample(
            monotonic(),
            _rss(),
            sys.getallocatedblocks(),
            _descriptors(),
            len(running_tasks()),
            connected,
        )

    def _check_memory(self) -> None:
        warm, end = self.memory()
        grown = end[0] > MAX_RSS_RATIO * warm[0] or end[1] > MAX_BLOCKS_RATIO * warm[1]
        if grown and self._seconds >= MEMORY_CHECK_SECONDS:
            self.run.breach(f"memory grew from {_memory(warm)} to {_memory(end)}")
        most = max(sample.descriptors for sample in self.samples)
        # Each client has one socket: it closes the old one before it reconnects.
        allowed = self.samples[0].descriptors + len(self._clients)
        if isinstance(self._broker, Cluster):
            # The driver has a client for each node, and runs a command with its pipes.
            allowed += len(self._broker.urls) + 10
        if most > allowed:
            self.run.breach(f"up to {most} descriptors were open, instead of {allowed}")

    def memory(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return RSS in MiB and the blocks, after the warm-up and at the end."""
        began = self.samples[0].time

        def over(first: float, last: float) -> tuple[float, float]:
            # Calls that wait during a fault take memory, so compare the half with more connections.
            chosen = [s for s in self.samples if first <= (s.time - began) / self._seconds < last]
            chosen.sort(key=lambda sample: sample.connected)
            calm = chosen[len(chosen) // 2 :]
            return median(s.rss for s in calm), median(s.blocks for s in calm)

        return over(WARM_UP_FRACTION, WARM_UP_FRACTION + 0.2), over(0.8, 1)


def _memory(figures: tuple[float, float]) -> str:
    return f"{figures[0]:.1f} MiB in {figures[1]:.0f} blocks"


def _rss() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * _PAGE / 2**20


def _descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return 0


def soak(options: argparse.Namespace, backend: str) -> bool:
    """Run on one backend, and return whether it had no breaches."""
    random.seed(options.seed)
    with ExitStack() as stack:
        broker: Disturbed
        if options.cluster:
            cluster = cluster_from_environment()
            if cluster is None:
                raise SystemExit("EMITTER_CLUSTER is not set")
            key, secret = anyio.run(_generate_key, cluster), cluster.secret
            ports = [urlsplit(url).port or 8080 for url in cluster.urls]
            broker = cluster
        else:
            keys = Broker()
            broker = single = BrokerProcess(keys.license)
            stack.callback(single.kill)
            single.start()
            key, secret, ports = keys.keygen("soak/#/", "rwslp"), keys.secret_key, [single.port]
        network = Network(ports)
        stack.callback(network.end)
        path = options.journal or stack.enter_context(tempfile.TemporaryDirectory())
        journal = Path(path, f"{backend}.journal")
        journal.parent.mkdir(parents=True, exist_ok=True)
        run = Run(
            key,
            secret,
            options.seed,
            network.ports,
            max(1, options.clients // CLIENTS_PER_CHANNEL),
            options.pace,
            stack.enter_context(journal.open("w")),
            len(ports),
        )
        log = logging.getLogger("emitter_anyio")
        log.propagate = False
        handler = _IncompleteResumptions(run)
        log.addHandler(handler)
        stack.callback(log.removeHandler, handler)
        soak = Soak(options, run, broker, network)
        anyio.run(soak, backend=backend)
        run.journal.flush()
        with journal.open() as lines:
            account = Accounting().read(lines)
    return _report(options, backend, soak, account)


async def _generate_key(cluster: Cluster) -> str:
    if not await cluster.is_sound():
        await cluster.reset()
    async with cluster.clients() as clients:
        return await cluster.keygen(clients[0], "soak/#/")


def _report(options: argparse.Namespace, backend: str, soak: Soak, account: Account) -> bool:
    print(f"{backend}: {options.clients} clients, {options.seconds:g} s, --seed {options.seed}")
    _table("faults", soak.faults.items())
    replaced = soak.connections - options.clients
    print(f"  connections: {soak.connections}, of which {replaced} replaced a lost one")
    _table("calls", ((f"{name}: {end}", n) for (name, end), n in sorted(soak.run.calls.items())))
    _table("messages", account.figures.items())
    print("  over time: seconds, MiB, blocks, descriptors, tasks, connected")
    first = soak.samples[0].time
    for sample in soak.samples[:: max(1, len(soak.samples) // 12)]:
        print(
            f"    {sample.time - first:7.1f} {sample.rss:8.1f} {sample.blocks:8} "
            f"{sample.descriptors:6} {sample.tasks:6} {sample.connected:6}"
        )
    warm, end = map(_memory, soak.memory())
    print(f"  memory: {warm} when warm, {end} at the end")
    breaches = [*soak.run.breaches, *account.breaches]
    print(f"  breaches: {len(breaches)}")
    for text in breaches[:40]:
        print(f"    {text}")
    return not breaches


def _table(title: str, rows: Iterable[tuple[str, int]]) -> None:
    print(f"  {title}:")
    for name, number in rows:
        print(f"    {number:9} {name}")


def main() -> int:
    """Run on the selected backends."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--pace", type=float, default=2, help="seconds between two bursts of a client"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: any")
    parser.add_argument("--backend", choices=["asyncio", "trio", "both"], default="both")
    parser.add_argument("--journal", help="the directory in which to keep the journals")
    parser.add_argument("--cluster", action="store_true", help="use the nodes of EMITTER_CLUSTER")
    options = parser.parse_args()
    options.parser = parser
    backends = ["asyncio", "trio"] if options.backend == "both" else [options.backend]
    print(f"--seed {options.seed}", flush=True)
    failed = [backend for backend in backends if not soak(options, backend)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
