"""
Work out from the journal of a run which messages had to arrive.

A line of the journal is the time in seconds, a letter, and fields:

====  ==========================================  ==================================================
``P``  publisher, number, qos, stored             ``publish()`` is called
``A``  publisher, number, outcome                 it ended: ``ok``, ``cancelled``, or an error
``L``  publisher, uncertain, unsent               its statistics, after a lost connection or leaving
``O``  stream, kind, channel                      a subscriber starts: ``kept`` (``resume=True``),
                                                  ``plain``, or ``heard`` (handlers, resumed too)
``R``  stream, publisher, number, replayed        it received a message
``G``  stream, complete                           it received a ``Gap``, or an overflow error
``W``  channel                                    the log reports an incomplete resumption
``K``  start                                      the broker was killed and lost its stored messages
``C``  client, node                               a client is connected to this node of a cluster,
                                                  or to ``none``
``X``  start                                      nodes were cut off, restarted or suspended, until
                                                  all clients had reconnected
====  ==========================================  ==================================================

A publisher makes one call at a time and numbers its messages consecutively, so a message is missing
if a subscriber received one before it and one after it; no clock is needed. Messages before a
subscriber's first live one are not checked. The last one is always received, because the faults end
before a run does.

The name of a stream begins with its client and a dot. Losses between clients on different nodes
during a fault of the cluster are counted as "unseen", because no client can detect them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Final, NamedTuple

_NO_NODE: Final = "none"
_LIVE: Final = "live between two nodes"
_NOT_ASKED: Final = "stored on a node that was not asked"
_EVENTS_LAG_SECONDS: Final = 0.5
"""The time within which a client notes a lost connection or a new one."""
_NODES_LAG_SECONDS: Final = 1.0
"""The time for which an accepted message can wait for another node, and die with its own."""


@dataclass(slots=True)
class _Publish:
    called: float
    qos: int
    stored: bool
    ended: float = inf
    outcome: str = "pending"
    seen: bool = False


class _Arrival(NamedTuple):
    """The arrival of a message, and the count of gaps before it."""

    time: float
    gaps: int
    replayed: bool


@dataclass(slots=True)
class _Received:
    """The messages that one subscriber received from one publisher."""

    live: dict[int, int] = field(default_factory=dict)
    """By number: the count of gaps before the message."""
    all: dict[int, _Arrival] = field(default_factory=dict)
    """By number: the first arrival of the message."""
    first_live: int = 0
    last_live: int = 0
    last_replayed: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Stream:
    client: str
    kind: str
    channel: str
    gaps: int = 0
    incomplete: list[int] = field(default_factory=list)
    received: defaultdict[int, _Received] = field(default_factory=lambda: defaultdict(_Received))


@dataclass(slots=True)
class _Loss:
    """A connection that a publisher lost, and how many publishes became uncertain or unsent."""

    time: float
    uncounted: int


@dataclass
class Account:
    """
    The result of reading a journal.

    :ivar breaches: violations of what the client promises
    :ivar figures: counts of messages by kind
    """

    breaches: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Accounting:
    """Reads a journal and produces an :class:`Account`."""

    def __init__(self) -> None:
        self._account = Account()
        self._publishes: dict[int, dict[int, _Publish]] = defaultdict(dict)
        self._streams: dict[str, _Stream] = {}
        self._losses: dict[int, list[_Loss]] = defaultdict(list)
        self._counted: dict[int, int] = defaultdict(int)
        self._kills: list[tuple[float, float]] = []
        self._warnings: dict[str, list[float]] = defaultdict(list)
        self._lost: dict[int, set[int]] = defaultdict(set)
        self._connections: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self._cluster_faults: list[tuple[float, float]] = []

    def read(self, lines: Iterable[str]) -> Account:
        """Read a whole journal."""
        rest: list[str] = []
        for line in lines:
            # A client notes its node after it has received the first messages from it.
            if line.split(maxsplit=2)[1] == "C":
                self._take(line)
            else:
                rest.append(line)
        for line in rest:
            self._take(line)
        for stream in self._streams.values():
            for publisher, received in stream.received.items():
                self._find_missing(stream, publisher, received)
        for publisher, lost in self._lost.items():
            self._check_lost(publisher, sorted(lost))
        self._count_publishes()
        return self._account

    def _breach(self, text: str) -> None:
        self._account.breaches.append(text)

    def _take(self, line: str) -> None:
        first, letter, *fields = line.split()
        time = float(first)
        match letter, fields:
            case "P", [publisher, number, qos, stored]:
                published = _Publish(time, int(qos), stored == "1")
                self._publishes[int(publisher)][int(number)] = published
            case "A", [publisher, number, outcome]:
                published = self._publishes[int(publisher)][int(number)]
                published.outcome, published.ended = outcome, time
            case "L", [publisher, uncertain, unsent]:
                counted = int(uncertain) + int(unsent)
                new = counted - self._counted[int(publisher)]
                self._counted[int(publisher)] = counted
                self._account.figures["uncertain or unsent"] += new
                if new:
                    self._losses[int(publisher)].append(_Loss(time, new))
            case "O", [name, kind, channel]:
                self._streams[name] = _Stream(name.partition(".")[0], kind, channel)
            case "R", [name, publisher, number, replayed]:
                self._receive(time, name, int(publisher), int(number), replayed == "1")
            case "G", [name, complete]:
                self._account.figures["gaps"] += 1
                stream = self._streams[name]
                stream.gaps += 1
                if complete == "0":
                    stream.incomplete.append(stream.gaps)
            case "W", [channel]:
                self._warnings[channel].append(time)
            case "K", [began]:
                self._kills.append((float(began), time))
            case "C", [client, node]:
                self._connections[client].append((time, node))
            case "X", [began]:
                self._cluster_faults.append((float(began) - _NODES_LAG_SECONDS, time))
            case _:
                raise ValueError(f"invalid journal line: {letter} {fields}")

    def _receive(self, time: float, name: str, publisher: int, number: int, replayed: bool) -> None:
        stream = self._streams[name]
        received = stream.received[publisher]
        what = f"{stream.kind} {name}: message {publisher}/{number}"
        published = self._publishes[publisher].get(number)
        self._account.figures["replayed" if replayed else "live"] += 1
        if published is None:
            self._breach(f"{what} was never published")
            return
        published.seen = True
        received.all.setdefault(number, _Arrival(time, stream.gaps, replayed))
        if replayed:
            if (
                received.last_replayed >= (stream.gaps, number)
                and self._took_one_way(publisher, number, received.last_replayed[1])
                and not (stream.kind == "heard" and self._has_reconnected(stream, published, time))
            ):
                self._breach(f"{what} was replayed after {received.last_replayed[1]}")
            received.last_replayed = stream.gaps, number
            return
        late = number in received.live or number < received.last_live
        if late and self._has_moved(stream, published.called, time):
            # The former node forwards messages late, which the client might have received from it.
            self._account.figures["twice or late after a failover"] += 1
        elif number in received.live:
            self._breach(f"{what} arrived twice")
        elif late and self._took_one_way(publisher, number, received.last_live):
            self._breach(f"{what} arrived after {received.last_live}")
        received.live[number] = stream.gaps
        received.first_live = received.first_live or number
        received.last_live = max(number, received.last_live)

    def _find_missing(self, stream: _Stream, publisher: int, received: _Received) -> None:
        if not received.first_live:
            return
        missing = set(range(received.first_live, max(received.all))) - received.all.keys()
        all_received, live = sorted(received.all), sorted(received.live)
        for number in sorted(missing):
            published = self._publishes[publisher][number]
            if published.outcome != "ok":
                continue
            after = all_received[bisect_left(all_received, number)]
            before = all_received[bisect_left(all_received, number) - 1]
            if stream.kind != "plain" and published.stored:
                excused = self._is_excused(stream, published.called, received, before, after)
            elif stream.kind == "heard":
                # Handlers learn of a gap only by events, which are not ordered with messages.
                excused = True
            else:
                at = bisect_left(live, number)
                excused = at == len(live) or received.live[live[at - 1]] < received.live[live[at]]
            if excused:
                self._account.figures["missed in a gap"] += 1
            elif what := self._find_unseen(stream, publisher, number, received.all[after].time):
                self._account.figures[f"unseen: {what}"] += 1
            elif published.qos == 0 and not published.seen:
                self._lost[publisher].add(number)
            else:
                self._breach(
                    f"{stream.kind} on {stream.channel}: message {publisher}/{number} (qos="
                    f"{published.qos}, stored={published.stored}, called at {published.called}) "
                    f"is missing between {before} and {after}, the latter received at "
                    f"{received.all[after].time}"
                )

    def _is_excused(
        self, stream: _Stream, called: float, received: _Received, before: int, after: int
    ) -> bool:
        """Return whether the broker lost its storage, or the subscriber saw an incomplete gap."""
        earlier, later = received.all[before], received.all[after]
        if any(began <= later.time and called <= dead for began, dead in self._kills):
            return True
        if stream.kind == "heard":
            return any(called <= time <= later.time for time in self._warnings[stream.channel])
        # A message that was read back belongs to its gap, as do the missing ones next to it.
        read_back = {each.gaps for each in (earlier, later) if each.replayed}
        return any(
            earlier.gaps < gap <= later.gaps or gap in read_back for gap in stream.incomplete
        )

    def _find_unseen(self, stream: _Stream, publisher: int, number: int, until: float) -> str:
        """Return how a message was lost between two nodes, or ``""``."""
        published = self._publishes[publisher][number]
        receiving = list(self._connections_of(stream.client, published.called, until))
        sending = self._connections_of(str(publisher), published.called, published.ended)
        nodes = {node for _, node in (*receiving, *sending)} - {_NO_NODE}
        if len(nodes) < 2:
            return ""
        is_read_back = stream.kind != "plain" and published.stored and len(receiving) > 1
        end = until if is_read_back else published.ended
        during_fault = any(
            published.called <= ended and end >= began for began, ended in self._cluster_faults
        )
        if during_fault:
            return _NOT_ASKED if is_read_back else _LIVE
        # Emitter counts the subscribers of other nodes incorrectly if they come and go quickly.
        accepted = published.qos == 1 or published.seen
        return f"{_LIVE}, without a fault" if accepted and not is_read_back else ""

    def _connections_of(
        self, client: str, since: float, until: float
    ) -> Iterator[tuple[float, str]]:
        """
        Yield the connections of a client in a period: since when, and to which node.

        The client notes them with a lag. A message of QoS 0 might wait for the next one.
        """
        connections = self._connections[client]
        first = bisect_right(connections, since, key=lambda entry: entry[0])
        found = False
        for each in connections[max(first - 1, 0) :]:
            if found and each[0] > until + _EVENTS_LAG_SECONDS:
                break
            yield each
            found = each[1] != _NO_NODE

    def _has_reconnected(self, stream: _Stream, published: _Publish, until: float) -> bool:
        """Return whether messages might have been read back twice; handlers see no gaps."""
        return len(list(self._connections_of(stream.client, published.called, until))) > 1

    def _has_moved(self, stream: _Stream, since: float, until: float) -> bool:
        """Return whether the client of a stream was connected to several nodes in a period."""
        connections = self._connections_of(stream.client, since, until)
        return len({node for _, node in connections} - {_NO_NODE}) > 1

    def _took_one_way(self, publisher: int, *numbers: int) -> bool:
        """
        Return whether messages were published on the same connection, so they keep their order.

        History sorts those of several nodes, and those before and after a restart, by the second.
        """
        found: set[tuple[float, str]] = set()
        for number in numbers:
            one = self._publishes[publisher][number]
            found.update(self._connections_of(str(publisher), one.called, one.ended))
        return len(found) < 2

    def _check_lost(self, publisher: int, lost: list[int]) -> None:
        """
        Check that lost ``qos=0`` messages are among those that the publisher counted.

        The publishes that are uncertain after a lost connection are consecutive: they follow the
        last one that the broker is known to have read and precede the first one that is sent
        again. So the lost ones must be close together, not just few enough.
        """
        publishes = self._publishes[publisher]
        accepted = [n for n, one in publishes.items() if one.qos == 0 and one.outcome == "ok"]
        place = {number: at for at, number in enumerate(accepted)}
        left = lost
        for loss in self._losses[publisher]:
            if not left:
                break
            end = place[left[0]] + loss.uncounted
            left = [n for n in left if place[n] >= end or publishes[n].called > loss.time]
        self._account.figures["lost and counted"] += len(lost) - len(left)
        for number in left:
            self._breach(
                f"message {publisher}/{number} (qos=0, called at {publishes[number].called}) was "
                "accepted, was never received, and is counted neither as uncertain nor as unsent"
            )

    def _count_publishes(self) -> None:
        for publisher, publishes in self._publishes.items():
            for number, one in publishes.items():
                self._account.figures[f"published qos={one.qos}"] += 1
                if one.outcome == "pending":
                    self._breach(f"the publish {publisher}/{number} has not ended")
                if one.qos == 0 and one.outcome == "cancelled" and one.seen:
                    self._breach(f"message {publisher}/{number} was cancelled, and sent")
