"""
What must have arrived, worked out from the journal of a run.

A line of the journal is the time in seconds, a letter, and fields:

====  ==========================================  ==================================================
``P``  publisher, number, qos, stored             a publish is called
``A``  publisher, number, outcome                 it has ended: ``ok``, ``cancelled``, or an error
``L``  publisher, uncertain, unsent               its figures, when it has lost a link or has left
``O``  stream, kind, channel                      a subscriber begins: ``kept`` (``resume=True``),
                                                  ``plain``, or ``heard`` (handlers, resumed too)
``R``  stream, publisher, number, replayed        it has got a message
``G``  stream, complete                           it has got a ``Gap``, or the place of an overflow
``W``  channel                                    the log says that a resuming is not complete
``K``  when it began                              the broker is dead, and with it all that it stored
====  ==========================================  ==================================================

Every publisher calls in turn, and its numbers have no holes, so that no clock is needed to know
that a message is missing: a subscriber got one before it and one behind it. Neither is anything
said of what came before a subscriber's first live message; the last one is always got, since a run
ends in peace.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Publish:
    called: float
    qos: int
    stored: bool
    outcome: str = "pending"
    seen: bool = False


@dataclass(slots=True)
class _Got:
    """What one subscriber has got of one publisher."""

    live: dict[int, int] = field(default_factory=dict)
    """By number, behind how many gaps."""
    all: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By number, when it first came and behind how many gaps."""
    first_live: int = 0
    last_live: int = 0
    last_replayed: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Stream:
    kind: str
    channel: str
    gaps: int = 0
    incomplete: list[int] = field(default_factory=list)
    got: defaultdict[int, _Got] = field(default_factory=lambda: defaultdict(_Got))


@dataclass(slots=True)
class _Loss:
    """A link that a publisher has lost, with so many publishes of which nobody knows."""

    time: float
    uncounted: int


@dataclass
class Account:
    """
    What a journal comes to.

    :ivar breaches: what must not be
    :ivar figures: what there was
    """

    breaches: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Accounting:
    """Reads a journal and draws up the account."""

    def __init__(self) -> None:
        self._account = Account()
        self._publishes: dict[int, dict[int, _Publish]] = defaultdict(dict)
        self._streams: dict[str, _Stream] = {}
        self._losses: dict[int, list[_Loss]] = defaultdict(list)
        self._counted: dict[int, int] = defaultdict(int)
        self._kills: list[tuple[float, float]] = []
        self._warnings: dict[str, list[float]] = defaultdict(list)
        self._lost: dict[int, set[int]] = defaultdict(set)

    def read(self, lines: Iterable[str]) -> Account:
        """Read all of it."""
        for line in lines:
            time, letter, *fields = line.split()
            self._take(float(time), letter, fields)
        for stream in self._streams.values():
            for publisher, got in stream.got.items():
                self._look_for_holes(stream, publisher, got)
        for publisher, lost in self._lost.items():
            self._settle(publisher, sorted(lost))
        self._count_publishes()
        return self._account

    def _breach(self, text: str) -> None:
        self._account.breaches.append(text)

    def _take(self, time: float, letter: str, fields: list[str]) -> None:
        match letter, fields:
            case "P", [publisher, number, qos, stored]:
                published = _Publish(time, int(qos), stored == "1")
                self._publishes[int(publisher)][int(number)] = published
            case "A", [publisher, number, outcome]:
                self._publishes[int(publisher)][int(number)].outcome = outcome
            case "L", [publisher, uncertain, unsent]:
                counted = int(uncertain) + int(unsent)
                new = counted - self._counted[int(publisher)]
                self._counted[int(publisher)] = counted
                self._account.figures["uncertain or unsent"] += new
                if new:
                    self._losses[int(publisher)].append(_Loss(time, new))
            case "O", [name, kind, channel]:
                self._streams[name] = _Stream(kind, channel)
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
            case _:
                raise ValueError(f"no line of a journal: {letter} {fields}")

    def _receive(self, time: float, name: str, publisher: int, number: int, replayed: bool) -> None:
        stream = self._streams[name]
        got = stream.got[publisher]
        what = f"{stream.kind} {name}: message {publisher}/{number}"
        published = self._publishes[publisher].get(number)
        self._account.figures["replayed" if replayed else "live"] += 1
        if published is None:
            self._breach(f"{what} was never published")
            return
        published.seen = True
        got.all.setdefault(number, (time, stream.gaps))
        if replayed:
            if got.last_replayed >= (stream.gaps, number):
                self._breach(f"{what} was replayed behind {got.last_replayed[1]}")
            got.last_replayed = stream.gaps, number
            return
        if number in got.live:
            self._breach(f"{what} came twice")
        elif number < got.last_live:
            self._breach(f"{what} came behind {got.last_live}")
        got.live[number] = stream.gaps
        got.first_live = got.first_live or number
        got.last_live = max(number, got.last_live)

    def _look_for_holes(self, stream: _Stream, publisher: int, got: _Got) -> None:
        if not got.first_live:
            return
        missing = set(range(got.first_live, max(got.all))) - got.all.keys()
        all_got, live = sorted(got.all), sorted(got.live)
        for number in sorted(missing):
            published = self._publishes[publisher][number]
            if published.outcome != "ok":
                continue
            after = all_got[bisect_left(all_got, number)]
            before = all_got[bisect_left(all_got, number) - 1]
            if stream.kind != "plain" and published.stored:
                excused = self._is_resuming_excused(stream, published.called, got, before, after)
            elif stream.kind == "heard":
                # Handlers are told of no gaps, but by events that are in no order with messages.
                excused = True
            else:
                at = bisect_left(live, number)
                excused = at == len(live) or got.live[live[at - 1]] < got.live[live[at]]
            if excused:
                self._account.figures["missed in a gap"] += 1
            elif published.qos == 0 and not published.seen:
                self._lost[publisher].add(number)
            else:
                self._breach(
                    f"{stream.kind} on {stream.channel}: message {publisher}/{number} (qos="
                    f"{published.qos}, stored={published.stored}, called at {published.called}) "
                    f"is missing, between {before} and {after}, got at {got.all[after][0]}"
                )

    def _is_resuming_excused(
        self, stream: _Stream, called: float, got: _Got, before: int, after: int
    ) -> bool:
        """Tell whether the storage has died too, or the subscriber was told of something left."""
        until, gaps = got.all[after]
        if any(began <= until and called <= dead for began, dead in self._kills):
            return True
        if stream.kind == "heard":
            return any(called <= time <= until for time in self._warnings[stream.channel])
        return any(got.all[before][1] < gap <= gaps for gap in stream.incomplete)

    def _settle(self, publisher: int, lost: list[int]) -> None:
        """
        See whether what was accepted at ``qos=0`` and got nowhere is what the publisher counts.

        What is uncertain when a link is lost are calls that follow each other: behind the last one
        that the broker is known to have taken, and before the first one that is sent again. So the
        lost ones must lie close enough, and not just be few enough.
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
                "accepted, has got nowhere, and is neither uncertain nor unsent"
            )

    def _count_publishes(self) -> None:
        for publisher, publishes in self._publishes.items():
            for number, one in publishes.items():
                self._account.figures[f"published qos={one.qos}"] += 1
                if one.outcome == "pending":
                    self._breach(f"the publish {publisher}/{number} has not ended")
                if one.qos == 0 and one.outcome == "cancelled" and one.seen:
                    self._breach(f"message {publisher}/{number} was cancelled, and sent")
