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
        self.unasked: set[Exchange] = set()


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

        A node that has met an earlier run of it does not ask it any more, as was seen on real ones.
        """
        for other in self.others(node):
            member = self._members[other]
            (member.unasked if node in member.met else member.met).add(node)
            self._members[node].met.add(other)
        self._members[node].running = True
        self._exchange_bans(node)

    def stop(self, node: Exchange) -> None:
        """End a run of a node: the others notice it, and the next run knows nothing of this one."""
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
        """Have one node do something for another: now, when it is resumed, or never."""
        if receiver not in self.reached(sender):
            return
        delayed = self._members[receiver].delayed
        if delayed is None:
            act()
        else:
            delayed.append(act)

    def survey(self, asker: Exchange, ask: Callable[[Exchange], T]) -> tuple[list[T], bool]:
        """
        Ask the other nodes.

        :return: their answers, and whether one that was asked gives none
        """
        unasked = self._members[asker].unasked
        asked = [other for other in self.others(asker) if other not in unasked]
        reached = self.reached(asker)
        there = [o for o in asked if o in reached and self._members[o].delayed is None]
        return [ask(other) for other in there], len(there) < len(asked)

    def _exchange_bans(self, node: Exchange) -> None:
        for other in self.reached(node):
            self.send(node, other, partial(other.learn, node.bans))
            self.send(other, node, partial(node.learn, other.bans))
