"""The command ``bench``."""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final

import anyio
from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    IncompleteRead,
    create_task_group,
)
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from emitter_anyio._values.channels import check_key

from . import _arguments as arguments_
from ._arguments import MAX_MESSAGE_BYTES, CommandError, Parser, UsageError
from ._bench_figures import HEADER, Measurement, summarize
from ._formats import to_json
from ._output import counted, print_line
from ._source import SECRET_HELP, Source, add_source, connect_once
from ._terminal import progress

_ROLES: Final = ("pub", "sub", "rtt", "connect")

_SIZE_HELP: Final = f"bytes of a message, {HEADER.size} to {MAX_MESSAGE_BYTES}"

_MAX_LINE_BYTES: Final = 16 * 1024 * 1024

_PROGRAM: Final = "from emitter_anyio._cli._bench_worker import main; main()"

_PLAIN: Final = (str, int, float, bool, type(None))
"""The types of arguments that are passed to the processes, as JSON."""


def add_bench(parser: Parser) -> None:
    """Add the arguments of ``bench``."""
    parser.set_command(
        _bench,
        arguments="pub|sub|rtt|connect --url URL",
        description=(
            "Measure a broker for some seconds, or until Ctrl-C.\n\n"
            "  pub      publish as fast as possible. The latency is the time until the broker\n"
            "           has accepted a message; with --qos 0, the time of a PINGREQ\n"
            "  sub      receive what 'bench sub' itself publishes from a further process. The\n"
            "           latency is the time from publishing to receiving. With --no-publish,\n"
            "           receive what 'bench pub' publishes elsewhere, and compare the clocks\n"
            "  rtt      publish a message to the same connection, wait until it arrives, and\n"
            "           repeat\n"
            "  connect  connect and disconnect, and repeat\n\n"
            "Messages are numbered, so that lost ones are counted. A benchmark can overload\n"
            "a broker, so the command requires --url and ignores EMITTER_URL. A channel key\n"
            "must be for CHANNEL, or for CHANNEL#/ with rtt."
        ),
        examples=(
            "  export URL=mqtt://127.0.0.1:8080\n"
            "  %(prog)s pub --url $URL --qos 1 --in-flight 1\n"
            "  %(prog)s sub --url $URL --connections 10 --rate 1000\n"
            "  %(prog)s rtt --url $URL --seconds 10 --json\n"
            "  %(prog)s connect --url $URL --connections 8 --processes 2"
        ),
    )
    parser.add_argument("what", choices=_ROLES, metavar="WHAT", help="pub, sub, rtt or connect")
    parser.add_argument(
        "--channel",
        type=arguments_.channel,
        default="bench/",
        help="channel (default: %(default)s)",
    )
    for option, kind, default, metavar, help in (
        ("--connections", arguments_.positive, 1, "N", "connections in total"),
        ("--processes", arguments_.positive, 1, "N", "processes that share them"),
        ("--publishers", arguments_.positive, 1, "N", "sub: connections that publish"),
        ("--size", _size, 64, "BYTES", _SIZE_HELP),
        ("--in-flight", arguments_.positive, 20, "N", "pub --qos 1: messages in flight"),
        ("--seconds", arguments_.period, 5.0, "SEC", "duration"),
        ("--timeout", arguments_.period, 2.0, "SEC", "time after which a message is lost"),
    ):
        parser.add_argument(
            option,
            type=kind,
            default=default,
            metavar=metavar,
            help=f"{help} (default: {default:g})",
        )
    parser.add_argument(
        "--rate",
        type=arguments_.period,
        metavar="N",
        help="messages or connections per second in total",
    )
    parser.add_argument(
        "--qos", type=int, choices=[0, 1], default=0, metavar="N", help="0 or 1 (default: 0)"
    )
    parser.add_argument(
        "--no-publish", dest="publish", action="store_false", help="sub: only receive"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_source(
        parser,
        url_help="broker to measure (required)",
        key="key with permissions r and w",
        secret=SECRET_HELP,
    )


def _size(text: str) -> int:
    if not HEADER.size <= (size := arguments_.count(text)) <= MAX_MESSAGE_BYTES:
        raise argparse.ArgumentTypeError(
            f"expected an integer from {HEADER.size} to {MAX_MESSAGE_BYTES}"
        )
    return size


class _Worker:
    """
    A process with some of the connections.

    :param role: what its connections do
    """

    def __init__(self, process: Process, role: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.role = role
        self._process = process
        self._input = process.stdin
        self._output = BufferedByteReceiveStream(process.stdout)
        self._result: Measurement | None = None

    async def send(self, line: str) -> None:
        """Send a line, unless the process has ended, which :meth:`result` reports."""
        with suppress(BrokenResourceError, ClosedResourceError):
            await self._input.send(f"{line}\n".encode())

    async def wait_ready(self) -> None:
        """
        Wait until all connections are open.

        :raises CommandError: if one could not be opened
        """
        line = await self._receive()
        if line != "ready":
            raise CommandError(json.loads(line)["error"])

    async def result(self) -> Measurement:
        """
        Wait for the result.

        :raises CommandError: if the process has ended without one
        """
        if self._result is None:
            self._result = Measurement(**json.loads(await self._receive()))
        return self._result

    async def _receive(self) -> str:
        try:
            return (await self._output.receive_until(b"\n", _MAX_LINE_BYTES)).decode()
        except (IncompleteRead, EndOfStream, BrokenResourceError):
            code = await self._process.wait()
            raise CommandError(f"a process of the benchmark ended with exit code {code}") from None


async def _bench(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.url is None:
        raise UsageError("bench requires --url, because it can overload a broker")
    key = None if arguments.what == "connect" else await _find_key(source, arguments.channel)
    interrupted = True
    async with AsyncExitStack() as stack:
        plan = _plan(arguments, key)
        workers = [await stack.enter_async_context(_open(arguments, each)) for each in plan]
        for worker in workers:
            await worker.wait_ready()
        for worker in workers:
            await worker.send("go")
        try:
            await _measure(arguments, workers)
            interrupted = False
        finally:
            # After a signal, too, print what was measured until then.
            with CancelScope(shield=True):
                _report(arguments, await _stop(workers), interrupted=interrupted)


async def _find_key(source: Source, channel: str) -> str:
    async with connect_once(source) as emitter:
        key = source.key_for(emitter, "rw", f"{channel}#/")
        return check_key(key if isinstance(key, str) else await key())


def _plan(arguments: argparse.Namespace, key: str | None) -> list[dict[str, Any]]:
    """Return the arguments of each process."""
    common = {name: value for name, value in vars(arguments).items() if isinstance(value, _PLAIN)}
    common |= {"key": key, "run_id": secrets.token_hex(4)}

    def share(role: str, connections: int, processes: int, rate: float) -> list[dict[str, Any]]:
        numbers = [range(connections)[first::processes] for first in range(processes)]
        rate /= connections
        return [
            {**common, "role": role, "numbers": list(each), "connection_rate": rate}
            for each in numbers
            if each
        ]

    connections, processes = arguments.connections, arguments.processes
    if arguments.what != "sub":
        return share(arguments.what, connections, processes, arguments.rate or 0.0)
    plan = share("sub", connections, processes, 0)
    if arguments.publish:
        plan += share("pub", arguments.publishers, 1, arguments.rate or 0.0)
    return plan


@asynccontextmanager
async def _open(arguments: argparse.Namespace, plan: dict[str, Any]) -> AsyncGenerator[_Worker]:
    """Start a process, which ends with the block."""
    # Ctrl-C at a terminal reaches all processes of a session. These end when their input ends.
    async with await anyio.open_process(
        [sys.executable, "-c", _PROGRAM, arguments.backend], stderr=None, start_new_session=True
    ) as process:
        worker = _Worker(process, plan["role"])
        await worker.send(json.dumps(plan))
        yield worker


async def _measure(arguments: argparse.Namespace, workers: list[_Worker]) -> None:
    """Wait for the duration, or until a process has ended its measurement early."""
    steps = math.ceil(arguments.seconds)

    async def wait_result(worker: _Worker) -> None:
        await worker.result()
        tasks.cancel_scope.cancel()

    with progress(f"bench {arguments.what}", steps) as advance:
        async with create_task_group() as tasks:
            for worker in workers:
                tasks.start_soon(wait_result, worker)
            for _ in range(steps):
                await anyio.sleep(arguments.seconds / steps)
                advance(1)
            tasks.cancel_scope.cancel()


async def _stop(workers: list[_Worker]) -> list[tuple[str, Measurement]]:
    """Stop the publishers first, and return the results with the roles."""
    results: list[tuple[str, Measurement]] = []
    published: dict[str, int] = {}
    publishers = [worker for worker in workers if worker.role == "pub"]
    others = [worker for worker in workers if worker.role != "pub"]
    for group in (publishers, others):
        for worker in group:
            await worker.send(json.dumps(published))
        for worker in group:
            result = await worker.result()
            results.append((worker.role, result))
            published |= result.published
    return results


def _report(
    arguments: argparse.Namespace,
    results: Sequence[tuple[str, Measurement]],
    *,
    interrupted: bool,
) -> None:
    """
    Print the results.

    :raises CommandError: if an error ended the measurement
    """
    what, size = arguments.what, None if arguments.what == "connect" else arguments.size
    summary = summarize([result for role, result in results if role == what], size)
    if what == "sub" and arguments.publish:
        summary["published"] = sum(result.messages for role, result in results if role == "pub")
    if arguments.json:
        names = ("connections", "processes", "rate")
        settings = {name: getattr(arguments, name) for name in names}
        if size is not None:
            settings |= {"size": size, "qos": arguments.qos}
        print_line(to_json({"benchmark": what, **settings, **summary, "interrupted": interrupted}))
    else:
        connections = counted(arguments.connections, "connection")
        processes = min(arguments.processes, arguments.connections)
        title = f"bench {what}: {connections} in {processes} process{'es' * (processes > 1)}"
        if size is not None:
            title += f", {size:,} bytes, QoS {arguments.qos}"
        print_line(title + ", interrupted" * interrupted)
        for name, text in _rows(summary, what):
            print_line(f"{name:<12}{text}")
    for _, result in results:
        if result.error:
            raise CommandError(result.error)


def _rows(summary: dict[str, Any], what: str) -> list[tuple[str, str]]:
    seconds = f"in {summary['seconds']:.1f} s"
    if what == "connect":
        name, rate = "connects", f"{summary['connects_per_second']:,.0f}/s"
    else:
        name = "messages"
        megabytes = summary["bytes_per_second"] / 1e6
        rate = f"{summary['messages_per_second']:,.0f}/s  {megabytes:,.2f} MB/s"
    rows = [(name, f"{summary[name]:,} {seconds}  {rate}")]
    if "published" in summary:
        rows.append(("published", f"{summary['published']:,}"))
    latency = summary["latency_ms"]
    if latency is not None:
        rows.append(
            ("latency", "  ".join(f"{each} {_milliseconds(latency[each])}" for each in latency))
        )
    counts = ("lost", "duplicates", "reordered") if what in ("sub", "rtt") else ("failed",)
    rows += [(each, f"{summary[each]:,}") for each in counts]
    return rows


def _milliseconds(value: float) -> str:
    """Format a latency with about three digits."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f} ms"
