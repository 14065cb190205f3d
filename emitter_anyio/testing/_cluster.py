"""The nodes of a cluster, and the connections between them. Without I/O."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, NamedTuple, Protocol, Self, TypeVar


class Ban(NamedTuple):
    """
    The newest decision on a key.

    :ivar when: the number of the decision in the cluster
    """

    when: int
    banned: bool


class Node(Protocol):
    """
    The interface of a node.

    :ivar bans: the decisions that the node knows, by key
    """

    bans: dict[str, Ban]

    def merge_bans(self, bans: Mapping[str, Ban]) -> None:
        """Take over newer decisions from another node."""

    def hide_subscriptions(self, node: Self) -> None:
        """Make another node send no messages for the present subscriptions of this one."""

    def announce_loss(self, node: Self) -> None:
        """Announce to the clients of another node that the subscribers of this one have left."""


T = TypeVar("T")
N = TypeVar("N", bound=Node)


class _Member(Generic[N]):
    """The state of the current run of a node."""

    def __init__(self) -> None:
        self._running = False
        self._cut = False
        self._delayed: list[Callable[[], None]] | None = None  # a list while the node is paused
        self._met: set[N] = set()
        self._excluded: set[N] = set()  # the nodes that ignore the surveys of this one

    @property
    def running(self) -> bool:
        return self._running

    @property
    def cut(self) -> bool:
        return self._cut

    @property
    def paused(self) -> bool:
        return self._delayed is not None

    def start(self) -> None:
        self._running = True

    def meet(self, node: N) -> bool:
        """Record the start of another node, and return whether it has been started before."""
        known = node in self._met
        self._met.add(node)
        self._excluded.discard(node)
        return known

    def exclude(self, node: N) -> None:
        """Record that a node ignores the surveys of this one."""
        self._excluded.add(node)

    def surveys(self, node: N) -> bool:
        return node not in self._excluded

    def set_cut(self, cut: bool) -> None:
        self._cut = cut

    def pause(self) -> None:
        if self._delayed is None:
            self._delayed = []

    def resume(self) -> None:
        delayed, self._delayed = self._delayed, None
        for act in delayed or ():
            act()

    def do(self, act: Callable[[], None]) -> None:
        """Call the function, or delay the call while the node is paused."""
        if self._delayed is None:
            act()
        else:
            self._delayed.append(act)


class Cluster(Generic[N]):
    """
    The nodes of a cluster.

    A running node is a member for the others until it stops. Messages to it are delayed while it is
    paused, and lost while it is cut off.
    """

    def __init__(self) -> None:
        self._clock: Callable[[], float] = time.time
        self._ahead: float = 0.0
        self._members: dict[N, _Member[N]] = {}
        self._bans = itertools.count()

    def now(self) -> float:
        """Return the time of all nodes in Unix seconds."""
        return self._clock() + self._ahead

    def follow(self, clock: Callable[[], float] | None) -> None:
        """
        Follow a virtual clock, or the real one, without changing the current time.

        :param clock: the virtual clock, or ``None`` for the real one
        """
        if (clock or time.time) != self._clock:
            now, self._clock = self.now(), clock or time.time
            self._ahead += now - self.now()

    def advance(self, seconds: float) -> None:
        """Advance the clock of all nodes."""
        self._ahead += seconds

    def new_ban(self, banned: bool) -> Ban:
        """Return a decision that is newer than all earlier ones."""
        return Ban(next(self._bans), banned)

    def join(self, node: N) -> None:
        """Add a node that is not running yet."""
        self._members[node] = _Member()

    def start(self, node: N) -> None:
        """
        Start a node.

        Nodes that knew an earlier run of it ignore its surveys, and their clients receive nothing
        from it for their present subscriptions: a node of Emitter merges a stale entry of that run
        from their state, and in most restarts removes their subscriptions and surveys.
        """
        member = self._members[node]
        for other in self.others(node):
            member.meet(other)
            if self._members[other].meet(node):
                member.exclude(other)
                other.hide_subscriptions(node)
        member.start()
        self._exchange_bans(node)

    def stop(self, node: N) -> None:
        """Stop a node and forget the state of its run."""
        self._members[node] = _Member()

    def pause(self, node: N) -> None:
        """Delay everything that other nodes send to a node, and stop its replies."""
        self._members[node].pause()

    def resume(self, node: N) -> None:
        """Deliver to a node what was delayed."""
        self._members[node].resume()

    def cut(self, node: N, cut: bool) -> None:
        """
        Cut the connections of a node to the others, or restore them.

        The nodes of Emitter on both sides delete each other's subscriptions and surveys from their
        state, and do not take them over again when they are connected again.
        """
        if cut:
            for other in self.reached(node):
                for owner, viewer in ((node, other), (other, node)):
                    self._members[viewer].exclude(owner)
                    owner.announce_loss(viewer)
                    owner.hide_subscriptions(viewer)
        self._members[node].set_cut(cut)
        self._exchange_bans(node)

    def others(self, node: N) -> list[N]:
        """Return the other running nodes."""
        return [
            other for other, member in self._members.items() if member.running and other is not node
        ]

    def reached(self, node: N) -> list[N]:
        """Return the other nodes that a node is connected to, including paused ones."""
        if self._members[node].cut:
            return []
        return [other for other in self.others(node) if not self._members[other].cut]

    def send(self, sender: N, receiver: N, act: Callable[[], None]) -> None:
        """Call a function on behalf of a receiver, if the two nodes are connected."""
        if receiver in self.reached(sender):
            self.do(receiver, act)

    def do(self, node: N, act: Callable[[], None]) -> None:
        """Call a function on behalf of a node, or delay the call while it is paused."""
        self._members[node].do(act)

    def survey(self, asker: N, ask: Callable[[N], T]) -> tuple[list[T], bool]:
        """
        Ask the other nodes.

        :return: their replies, and whether a node did not reply
        """
        member, reached = self._members[asker], self.reached(asker)
        answering = [
            other for other in reached if member.surveys(other) and not self._members[other].paused
        ]
        return [ask(other) for other in answering], len(answering) < len(reached)

    def _exchange_bans(self, node: N) -> None:
        for other in self.reached(node):
            self.send(node, other, partial(other.merge_bans, node.bans))
            self.send(other, node, partial(node.merge_bans, other.bans))
