"""The command ``top``."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, nullcontext
from typing import Final

import anyio
from anyio import current_time

from emitter_anyio import EmitterMessage, EventStream, NodeStats, decode_stats

from . import _arguments as arguments_
from ._arguments import Parser
from ._formats import iso_time, to_json
from ._output import Output, counted, note, visible
from ._source import SECRET_HELP, Source, add_source, stay_connected
from ._terminal import live_table

_RATE_SECONDS: Final = 5
"""The time over which rates are averaged, because Emitter rounds times to seconds."""

_SILENT_SECONDS: Final = 5
"""The time without figures after which a node is shown as silent."""

_COLUMNS: Final = ("node", "connections", "subs", "peers", "in/s", "out/s", "uptime")
"""The columns of the table, which fits 80 columns of a terminal."""


def add_top(parser: Parser) -> None:
    """Add the arguments of ``top``."""
    parser.set_command(
        _top,
        description=(
            "Show the load of each node of the broker, from the figures that the node\n"
            "publishes every second, until Ctrl-C.\n\n"
            "On a terminal, a live table is shown if the extra 'cli' is installed. Otherwise,\n"
            "the command prints a line for each message of a node. 'in' counts the messages\n"
            "and requests that clients publish on the node, 'out' the messages that it sends\n"
            "to clients. Both are averages over 5 seconds. The subscriptions include those of\n"
            "other nodes."
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --count 1            # one line\n"
            "  %(prog)s --json | jq '{node, connections}'"
        ),
    )
    parser.add_argument(
        "--channel",
        type=arguments_.channel,
        default="stats/",
        help="channel of the figures (default: %(default)s)",
    )
    parser.add_argument(
        "-n", "--count", type=arguments_.positive, metavar="N", help="exit after N messages"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per message")
    add_source(parser, key="key for stats/#/ with permission r", secret=SECRET_HELP)


class _Node:
    """
    The figures of a node, and their rates.

    :ivar stats: the newest figures
    """

    def __init__(self) -> None:
        self._recent: deque[NodeStats] = deque()
        self._seen = 0.0

    @property
    def stats(self) -> NodeStats:
        return self._recent[-1]

    @property
    def silent_seconds(self) -> float:
        """The time since the newest figures arrived."""
        return current_time() - self._seen

    def add(self, stats: NodeStats) -> None:
        """Add newer figures."""
        self._seen = current_time()
        self._recent.append(stats)
        while len(self._recent) > 1 and sum(map(_seconds, self._recent)) > _RATE_SECONDS:
            self._recent.popleft()

    def rates(self) -> tuple[float, float]:
        """Return the received and the sent messages per second."""
        seconds = max(sum(map(_seconds, self._recent)), 1.0)
        received = sum(stats.received for stats in self._recent)
        sent = sum(stats.sent for stats in self._recent)
        return received / seconds, sent / seconds


def _seconds(stats: NodeStats) -> float:
    return (stats.end - stats.start).total_seconds()


async def _top(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    async with stay_connected(source) as emitter:
        # The '+' is for brokers with the matcher 'mqtt'.
        channel = f"{arguments.channel}+/"
        key = source.key_for(emitter, "r", channel)
        async with emitter.subscribe(key, channel, last=0, overflow="drop_oldest") as messages:
            async with aclosing(_updates(messages, arguments.count)) as updates:
                table = live_table("nodes of the broker", _COLUMNS)
                with nullcontext() if arguments.json else table as update:
                    if update is None:
                        await _print(updates, as_json=arguments.json)
                    else:
                        await _show(updates, update)


async def _updates(
    messages: EventStream[EmitterMessage], limit: int | None
) -> AsyncGenerator[_Node | None]:
    """
    Yield the node whose figures have arrived.

    :return: the nodes; ``None`` after a second in which no figures arrived
    """
    nodes: dict[str, _Node] = {}
    left = sys.maxsize if limit is None else limit
    quiet = 0
    while left:
        message = None
        with anyio.move_on_after(1):
            message = await messages.receive()
        if message is None:
            quiet += 1
            if quiet == _SILENT_SECONDS and not nodes:
                note(
                    f"no figures for {_SILENT_SECONDS} s: Emitter publishes them unless its "
                    "configuration has another 'monitor' than 'self'"
                )
            yield None
            continue
        try:
            stats = decode_stats(message.binary)
        except ValueError as exc:
            note(f"ignored a message from {message.channel}: {exc}")
            continue
        quiet = 0
        left -= 1
        node = nodes.setdefault(stats.node, _Node())
        node.add(stats)
        yield node


async def _print(updates: AsyncGenerator[_Node | None], *, as_json: bool) -> None:
    async with Output() as output:
        async for node in updates:
            await output.write(_to_line(node, as_json=as_json))


def _to_line(node: _Node | None, *, as_json: bool) -> bytes:
    if node is None:
        return b""
    line = _to_json(node) if as_json else _to_text(node)
    return f"{line}\n".encode()


def _to_json(node: _Node) -> str:
    stats, (received, sent) = node.stats, node.rates()
    return to_json(
        {
            "time": iso_time(stats.end),
            "node": stats.node,
            "address": stats.address,
            "uptime": stats.uptime,
            "connections": stats.connections,
            "subscriptions": stats.subscriptions,
            "peers": stats.peers,
            "seconds": _seconds(stats),
            "received": stats.received,
            "sent": stats.sent,
            "received_per_second": round(received, 1),
            "sent_per_second": round(sent, 1),
        }
    )


def _to_text(node: _Node) -> str:
    stats, (received, sent) = node.stats, node.rates()
    return visible(
        f"{stats.end.astimezone():%H:%M:%S}  {stats.node}  "
        f"{counted(stats.connections, 'connection')}  "
        f"{counted(stats.subscriptions, 'subscription')}  {counted(stats.peers, 'peer')}  "
        f"in {received:,.0f}/s  out {sent:,.0f}/s"
    )


async def _show(
    updates: AsyncGenerator[_Node | None],
    update: Callable[[str, Sequence[Sequence[str]], str], None],
) -> None:
    nodes: dict[str, _Node] = {}
    update("waiting for the first figures", [], "")
    async for node in updates:
        if node is not None:
            nodes[node.stats.node] = node
        rows = [_to_row(nodes[name]) for name in sorted(nodes)]
        newest = max((each.stats.end for each in nodes.values()), default=None)
        footer = "" if newest is None else f"as of {newest.astimezone():%H:%M:%S}"
        update(counted(len(rows), "node"), rows, footer)


def _to_row(node: _Node) -> list[str]:
    stats, rates = node.stats, node.rates()
    name = visible(stats.node)
    if node.silent_seconds >= _SILENT_SECONDS:
        return [name, *[""] * 5, f"silent {_duration(int(node.silent_seconds))}"]
    numbers = (stats.connections, stats.subscriptions, stats.peers, *rates)
    return [name, *(f"{number:,.0f}" for number in numbers), _duration(stats.uptime)]


def _duration(seconds: int) -> str:
    """Format a duration with its two largest units."""
    parts, left = list[str](), seconds
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or parts or size == 1:
            parts.append(f"{number}{name}")
    return " ".join(parts[:2])
