"""The nodes of a cluster: which of them reach each other, and what one sends to another. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from ._exchange import Exchange

T = TypeVar("T")


class Ban(NamedTuple):
    """What was last said about a key, and when, counted over the cluster."""

    when: int
    banned: bool


class _Member:
    """One node as the cluster sees it."""

    def __init__(self) -> None:
        self.running = False
        self.cut = False
        self.delayed: list[Callable[[], None]] | None = None  # a list while the node is paused
        self.met: set[Exchange] = set()  # in the node's current run
        self.deaf: set[Exchange] = set()  # nodes that do not hear what this one asks


class Cluster:
    """
    The nodes that run as one broker.

    A node that runs counts for the others until it stops. While it is paused, what they send to it
    waits; while it is cut off, that is lost.

    :ivar ahead: the seconds by which the clock of all nodes is ahead of the real one
    """

    def __init__(self) -> None:
        self.ahead: float = 0.0
        self._members: dict[Exchange, _Member] = {}
        self._bans = itertools.count()

    def new_ban(self, banned: bool) -> Ban:
        """Say something about a key that is newer than all that was said before."""
        return Ban(next(self._bans), banned)

    def join(self, node: Exchange) -> None:
        """Add a node, which does not run yet."""
        self._members[node] = _Member()

    def start(self, node: Exchange) -> None:
        """
        Begin a run of a node.

        Nodes that knew an earlier run do not get its surveys: a real node merges a stale entry of
        that run from their state, and in most restarts unsubscribes them from its surveys.
        """
        member = self._members[node]
        for other in self.others(node):
            there = self._members[other]
            if node in there.met:
                member.deaf.add(other)
            there.met.add(node)
            there.deaf.discard(node)
            member.met.add(other)
        member.running = True
        self._exchange_bans(node)

    def stop(self, node: Exchange) -> None:
        """End a run of a node, of which its next one knows nothing; the others notice it."""
        self._members[node] = _Member()

    def pause(self, node: Exchange) -> None:
        """Keep back what the other nodes send to a node, and do not let it answer them."""
        member = self._members[node]
        if member.delayed is None:
            member.delayed = []

    def resume(self, node: Exchange) -> None:
        """Let a node take what was kept back."""
        member = self._members[node]
        delayed, member.delayed = member.delayed, None
        for act in delayed or ():
            act()

    def cut(self, node: Exchange, cut: bool) -> None:
        """Cut a node off from the others, or connect it with them again."""
        self._members[node].cut = cut
        self._exchange_bans(node)

    def others(self, node: Exchange) -> list[Exchange]:
        """Give the other nodes that a node counts with."""
        return [
            other for other, member in self._members.items() if member.running and other is not node
        ]

    def reached(self, node: Exchange) -> list[Exchange]:
        """Give the other nodes to which a node is connected, paused ones among them."""
        if self._members[node].cut:
            return []
        return [other for other in self.others(node) if not self._members[other].cut]

    def send(self, sender: Exchange, receiver: Exchange, act: Callable[[], None]) -> None:
        """Have one node do something for another: never, if they are not connected."""
        if receiver in self.reached(sender):
            self.do(receiver, act)

    def do(self, node: Exchange, act: Callable[[], None]) -> None:
        """Have a node do something: later, if it is paused."""
        delayed = self._members[node].delayed
        if delayed is None:
            act()
        else:
            delayed.append(act)

    def survey(self, asker: Exchange, ask: Callable[[Exchange], T]) -> tuple[list[T], bool]:
        """
        Ask the other nodes.

        :return: their answers, and whether one of them gives none
        """
        deaf = self._members[asker].deaf
        answering = [
            other
            for other in self.reached(asker)
            if other not in deaf and self._members[other].delayed is None
        ]
        return [ask(other) for other in answering], len(answering) < len(self.others(asker))

    def _exchange_bans(self, node: Exchange) -> None:
        for other in self.reached(node):
            self.send(node, other, partial(other.learn, node.bans))
            self.send(other, node, partial(node.learn, other.bans))
