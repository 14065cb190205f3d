"""The figures that a node publishes about itself, in Emitter's binary format.

``emitter_anyio/_values/stats.py`` describes the format and its source.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from . import _snappy


class Gauges(NamedTuple):
    """
    The figures of a node at one moment.

    :ivar connections: the number of connections
    :ivar subscriptions: the number of subscriptions that the node knows
    :ivar peers: the number of other nodes that the node is connected to
    """

    connections: int
    subscriptions: int
    peers: int


class Stats:
    """
    The figures of a node since its last snapshot.

    :param node: the node, six bytes
    """

    def __init__(self, node: bytes) -> None:
        self.channel: str = f"stats/{node.hex()}/"
        self._node = node
        self._counts: Counter[str] = Counter()
        self._started = self._since = 0

    def start(self, now: float) -> None:
        """Begin again, when the node starts."""
        self._counts.clear()
        self._started = self._since = int(now)

    def count(self, name: str) -> None:
        """Count a packet, such as ``"rcv.pub"`` or ``"send.pub"``."""
        self._counts[name] += 1

    def snapshot(self, now: float, address: str, gauges: Gauges) -> bytes:
        """Encode the figures, and reset the counts."""
        seconds = int(now)
        times = _varint(self._since) + _varint(seconds)

        def metric(name: str, values: list[int], count: int = 1, tag: str = "") -> bytes:
            sample = b"".join(map(_varint, values))
            return b"".join(
                (_sized(name.encode()), _sized(tag.encode()), _sized(sample), _varint(count), times)
            )

        number = int.from_bytes(self._node[-4:], "big", signed=True)
        metrics = [
            metric("node.id", [number], tag=self._node.hex(":")),
            metric("node.addr", [], 0, address),
            metric("node.conns", [gauges.connections]),
            metric("node.subs", [gauges.subscriptions]),
            metric("node.peers", [gauges.peers]),
            metric("proc.uptime", [seconds - self._started]),
            # Emitter samples the time that handling a packet takes, but 0 is all it measures.
            *(metric(name, [0], count) for name, count in self._counts.items()),
        ]
        self._counts.clear()
        self._since = seconds
        return _snappy.encode(_snappy.uvarint(len(metrics)) + b"".join(metrics))


def _sized(data: bytes) -> bytes:
    return _snappy.uvarint(len(data)) + data


def _varint(value: int) -> bytes:
    """Encode a signed integer of 64 bits, with the sign in the lowest bit."""
    return _snappy.uvarint((value << 1 ^ value >> 63) & 2**64 - 1)
