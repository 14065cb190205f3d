"""The figures that each node of Emitter publishes about itself.

A snapshot is a Snappy block that contains a list of metrics. Lengths are unsigned varints, numbers
are zigzag varints. A metric consists of its name and tag (each with its length), its values (with
their length in bytes, sorted, each as the difference from the one before), the number of
measurements, and the Unix times at which the measuring began and ended.

Source: a snapshot recorded from Emitter 3.1 (``tests/support/stats.py``), and the MIT-licensed
packages ``emitter-io/stats`` and ``kelindar/binary`` that Emitter encodes it with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from . import snappy

_MAX_VARINT_BITS: Final = 64


@dataclass(frozen=True, slots=True)
class NodeMetric:
    """
    A metric of a node, measured since the snapshot before.

    :ivar name: the name, such as ``"heap.alloc"``
    :ivar tag: a text that belongs to the metric, or ``""``
    :ivar count: the number of measurements
    :ivar values: the measured values in ascending order; a sample of 1,024 if there were more
    :ivar start: the time at which the measuring began, in whole seconds
    :ivar end: the time of the snapshot, in whole seconds
    """

    name: str
    tag: str
    count: int
    values: tuple[int, ...]
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class NodeStats:
    """
    The figures of a node of Emitter. Counts cover the time from ``start`` to ``end``.

    :ivar node: the name of the node, such as ``"00:00:00:00:00:01"``
    :ivar address: the address that the node listens on
    :ivar connections: the number of open connections
    :ivar subscriptions: the number of subscriptions; those of other nodes' clients are included
    :ivar peers: the number of other nodes that the node is connected to
    :ivar uptime: the seconds since the node was started
    :ivar received: the number of messages and requests that clients published
    :ivar sent: the number of messages that were sent to clients
    :ivar start: the time of the snapshot before, in whole seconds
    :ivar end: the time of the snapshot, in whole seconds
    :ivar metrics: all metrics by name
    """

    node: str
    address: str
    connections: int
    subscriptions: int
    peers: int
    uptime: int
    received: int
    sent: int
    start: datetime
    end: datetime
    metrics: Mapping[str, NodeMetric] = field(repr=False)


def decode_stats(payload: bytes) -> NodeStats:
    """
    Decode a message of ``stats/<node>/``, which each node of Emitter publishes every second.

    It can be passed to ``subscribe(key, "stats/", decode=decode_stats)``.

    :param payload: the payload of the message
    :return: the figures of the node
    :raises TypeError: if the payload is not ``bytes``
    :raises ValueError: if the payload is not such a snapshot
    """
    if not isinstance(payload, bytes):
        raise TypeError(f"payload must be bytes, not {type(payload).__name__}")
    try:
        metrics = _Reader(snappy.decode(payload)).metrics()
        node = metrics["node.id"]
        return NodeStats(
            node=node.tag,
            address=metrics["node.addr"].tag,
            connections=_gauge(metrics["node.conns"]),
            subscriptions=_gauge(metrics["node.subs"]),
            peers=_gauge(metrics["node.peers"]),
            uptime=_gauge(metrics["proc.uptime"]),
            # Emitter leaves out a metric until it is measured for the first time.
            received=metrics["rcv.pub"].count if "rcv.pub" in metrics else 0,
            sent=metrics["send.pub"].count if "send.pub" in metrics else 0,
            start=node.start,
            end=node.end,
            metrics=metrics,
        )
    except IndexError:
        reason = "it is incomplete"
    except KeyError as exc:
        reason = f"the metric {exc} is missing"
    except (ValueError, OverflowError, OSError) as exc:
        reason = str(exc)
    raise ValueError(f"invalid snapshot of a node's figures: {reason}")


def _gauge(metric: NodeMetric) -> int:
    """Return the value of a metric that is measured once for each snapshot."""
    return metric.values[-1]


class _Reader:
    """Reads the parts of a decompressed snapshot, in order."""

    def __init__(self, data: bytes) -> None:
        self._data: Final = data
        self._at = 0

    def metrics(self) -> dict[str, NodeMetric]:
        found = {}
        for _ in range(self._unsigned()):
            metric = self._metric()
            found[metric.name] = metric
        if self._at != len(self._data):
            raise ValueError("bytes follow the last metric")
        return found

    def _metric(self) -> NodeMetric:
        name, tag, values = self._bytes().decode(), self._bytes().decode(), self._bytes()
        count, start, end = self._signed(), self._signed(), self._signed()
        return NodeMetric(name, tag, count, _sample(values), _time(start), _time(end))

    def _bytes(self) -> bytes:
        size = self._unsigned()
        found = self._data[self._at : self._at + size]
        if len(found) < size:
            raise IndexError
        self._at += size
        return found

    def _unsigned(self) -> int:
        value, self._at = snappy.read_uvarint(self._data, self._at)
        return value

    def _signed(self) -> int:
        value, self._at = _read_varint(self._data, self._at)
        return value


def _sample(data: bytes) -> tuple[int, ...]:
    values, value, at = list[int](), 0, 0
    while at < len(data):
        difference, at = _read_varint(data, at)
        value += difference
        values.append(value)
    return tuple(values)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value, at = snappy.read_uvarint(data, at)
    if value >> _MAX_VARINT_BITS:
        raise ValueError("a number has more than 64 bits")
    return value >> 1 ^ -(value & 1), at


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
