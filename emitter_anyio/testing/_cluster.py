"""The nodes of a cluster: which of them reach each other, and what one sends to another. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar


class Ban(NamedTuple):
    """What was last said about a key, and when, counted over the cluster."""

    when: int
    banned: bool


class Node(Protocol):
    """
    What a cluster needs of its nodes.

    :ivar bans: what a node knows about keys
    """

    bans: dict[str, Ban]

    def learn(self, bans: Mapping[str, Ban]) -> None:
        """Take over what another node knows about keys, if it is newer."""


T = TypeVar("T")
N = TypeVar("N", bound=Node)


class _Member(Generic[N]):
    """The current run of one node, as the cluster sees it."""

    def __init__(self) -> None:
        self._running = False
        self._cut = False
        self._delayed: list[Callable[[], None]] | None = None  # a list while the node is paused
        self._met: set[N] = set()
        self._deaf: set[N] = set()  # nodes that do not get what this one asks

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
        """Note that a run of another node begins, and return whether it is not its first one."""
        known = node in self._met
        self._met.add(node)
        self._deaf.discard(node)
        return known

    def lose(self, node: N) -> None:
        """Note that a node does not get what this one asks."""
        self._deaf.add(node)

    def is_heard_by(self, node: N) -> bool:
        return node not in self._deaf

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
        """Do something: later, if the node is paused."""
        if self._delayed is None:
            act()
        else:
            self._delayed.append(act)


class Cluster(Generic[N]):
    """
    The nodes that run as one broker.

    A node that runs counts for the others until it stops. While it is paused, what they send to it
    waits; while it is cut off, that is lost.
    """

    def __init__(self) -> None:
        self._ahead: float = 0.0
        self._members: dict[N, _Member[N]] = {}
        self._bans = itertools.count()

    @property
    def ahead(self) -> float:
        """The seconds by which the clock of all nodes is ahead of the real one."""
        return self._ahead

    def advance(self, seconds: float) -> None:
        """Put the clock of all nodes forward."""
        self._ahead += seconds

    def new_ban(self, banned: bool) -> Ban:
        """Say something about a key that is newer than all that was said before."""
        return Ban(next(self._bans), banned)

    def join(self, node: N) -> None:
        """Add a node, which does not run yet."""
        self._members[node] = _Member()

    def start(self, node: N) -> None:
        """
        Begin a run of a node.

        Nodes that knew an earlier run do not get its surveys: a real node merges a stale entry of
        that run from their state, and in most restarts unsubscribes them from its surveys.
        """
        member = self._members[node]
        for other in self.others(node):
            member.meet(other)
            if self._members[other].meet(node):
                member.lose(other)
        member.start()
        self._exchange_bans(node)

    def stop(self, node: N) -> None:
        """End a run of a node, of which its next one knows nothing; the others notice it."""
        self._members[node] = _Member()

    def pause(self, node: N) -> None:
        """Keep back what the other nodes send to a node, and do not let it answer them."""
        self._members[node].pause()

    def resume(self, node: N) -> None:
        """Let a node take what was kept back."""
        self._members[node].resume()

    def cut(self, node: N, cut: bool) -> None:
        """Cut a node off from the others, or connect it with them again."""
        self._members[node].set_cut(cut)
        self._exchange_bans(node)

    def others(self, node: N) -> list[N]:
        """Give the other nodes that a node counts with."""
        return [
            other for other, member in self._members.items() if member.running and other is not node
        ]

    def reached(self, node: N) -> list[N]:
        """Give the other nodes to which a node is connected, paused ones among them."""
        if self._members[node].cut:
            return []
        return [other for other in self.others(node) if not self._members[other].cut]

    def send(self, sender: N, receiver: N, act: Callable[[], None]) -> None:
        """Have one node do something for another: never, if they are not connected."""
        if receiver in self.reached(sender):
            self.do(receiver, act)

    def do(self, node: N, act: Callable[[], None]) -> None:
        """Have a node do something: later, if it is paused."""
        self._members[node].do(act)

    def survey(self, asker: N, ask: Callable[[N], T]) -> tuple[list[T], bool]:
        """
        Ask the other nodes.

        :return: their answers, and whether one of them gives none
        """
        member = self._members[asker]
        answering = [
            other
            for other in self.reached(asker)
            if member.is_heard_by(other) and not self._members[other].paused
        ]
        return [ask(other) for other in answering], len(answering) < len(self.others(asker))

    def _exchange_bans(self, node: N) -> None:
        for other in self.reached(node):
            self.send(node, other, partial(other.learn, node.bans))
            self.send(other, node, partial(node.learn, other.bans))
