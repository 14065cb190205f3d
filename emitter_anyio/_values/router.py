"""Matching channels to subscriptions by the broker's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Generic, Literal, TypeAlias, TypeVar

from .channels import levels, unshare
from .errors import InvalidChannelError

Matcher: TypeAlias = Literal["emitter", "mqtt"]
"""How the broker matches: ``"emitter"`` (its default) by prefix, ``"mqtt"`` by MQTT's rules."""

T = TypeVar("T")

_MAX_CACHED_CHANNELS: Final = 4096


def reaches(pattern: str, channel: str, matcher: Matcher = "emitter") -> bool:
    """
    Return whether a message to a channel reaches a subscription.

    With ``"emitter"``, a subscription matches its channel and all channels below it, ``+`` matches
    one level, and ``#`` matches nothing. With ``"mqtt"``, levels match one by one, and ``#``
    matches all remaining levels.

    :param pattern: the channel of the subscription
    :param channel: a channel without wildcards
    """
    wanted, given = levels(pattern), levels(channel)
    if matcher == "mqtt":
        if wanted[-1] == "#":
            wanted = wanted[:-1]
            given = given[: len(wanted)]
        if len(wanted) != len(given):
            return False
    elif len(wanted) > len(given):
        return False
    return all(w in ("+", g) for w, g in zip(wanted, given, strict=False))


def overlap(one: str, other: str, matcher: Matcher = "emitter") -> bool:
    """Return whether a message could reach both of two subscriptions."""
    a, b = _path(one), _path(other)
    if matcher == "mqtt":
        shortest = min(len(x) - 1 if x[-1] == "#" else len(x) for x in (a, b))
        if len(a) != len(b) and not any(
            x[-1] == "#" and len(x) - 1 <= len(y) for x, y in ((a, b), (b, a))
        ):
            return False
        a, b = a[:shortest], b[:shortest]
    elif "#" in (a[-1], b[-1]):
        return False
    return all(x == y or "+" in (x, y) for x, y in zip(a, b, strict=False))


def find_parent(filter: str, matcher: Matcher) -> str | None:
    """
    Return the channel to use instead of one to which the broker never delivers.

    :param filter: a checked channel, which can have a group
    :return: a channel that includes all channels below it, or ``None`` if the broker delivers
    """
    if matcher == "mqtt" or not filter.endswith("#/"):
        return None
    parent = filter.removesuffix("#/")
    return parent if levels(unshare(filter)[1]) != ["#"] else f"{parent}+/"


def check_delivered(filter: str, matcher: Matcher) -> None:
    """
    Check that the broker delivers to a subscription.

    :param filter: a checked channel, which can have a group
    :raises InvalidChannelError: if it never does
    """
    if (parent := find_parent(filter, matcher)) is not None:
        raise InvalidChannelError(
            f"invalid channel {filter!r}: Emitter delivers nothing to '#'; use {parent!r}, which "
            "includes all channels below it, or connect(matcher='mqtt') if the broker is "
            "configured with that matcher"
        )


@dataclass(slots=True)
class _Node(Generic[T]):
    children: dict[str, _Node[T]] = field(default_factory=dict)
    receivers: dict[T, int] = field(default_factory=dict)


@lru_cache(maxsize=4096)
def _path(channel: str) -> tuple[str, ...]:
    return tuple(levels(channel))


class _Tree(Generic[T]):
    """
    A tree of receivers by the levels of their patterns.

    :param matcher: how the broker matches
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher: Matcher = matcher
        self._everything: dict[T, int] = {}
        self._root: _Node[T] = _Node()

    def add(self, receiver: T, pattern: str | None, rank: int) -> None:
        """
        Add a receiver.

        :param pattern: the channel of its subscription; ``None`` matches every channel
        :param rank: its position in the results of :meth:`find`
        """
        self._receivers_at(pattern, make=True)[receiver] = rank

    def remove(self, receiver: T, pattern: str | None) -> None:
        """Remove a receiver."""
        del self._receivers_at(pattern)[receiver]
        if pattern is not None:
            self._prune(levels(pattern))

    def find(self, channel: str) -> tuple[T, ...]:
        """Return the receivers that match a channel, in the order of their ranks."""
        reached = self._collect(levels(channel if channel.endswith("/") else channel + "/"))
        return tuple(sorted(reached, key=reached.__getitem__))

    def _receivers_at(self, pattern: str | None, *, make: bool = False) -> dict[T, int]:
        if pattern is None:
            return self._everything
        node = self._root
        for level in levels(pattern):
            node = node.children.setdefault(level, _Node()) if make else node.children[level]
        return node.receivers

    def _prune(self, path: list[str]) -> None:
        node, passed = self._root, []
        for level in path:
            passed.append((node, level))
            node = node.children[level]
        while passed and not node.receivers and not node.children:
            node, level = passed.pop()
            del node.children[level]

    def _collect(self, path: list[str]) -> dict[T, int]:
        reached = dict(self._everything)
        nodes = [self._root]
        for depth in range(len(path) + 1):
            at_end = depth == len(path)
            for node in nodes:
                if at_end or self._matcher == "emitter":
                    reached.update(node.receivers)
                if self._matcher == "mqtt" and (rest := node.children.get("#")):
                    reached.update(rest.receivers)
            names = () if at_end else dict.fromkeys((path[depth], "+"))
            nodes = [
                node.children[name] for node in nodes for name in names if name in node.children
            ]
        return reached


class _Cache(dict[str, tuple[T, ...]]):
    """
    A cache of the receivers of each channel.

    It is a ``dict``, because looking up a cached channel then takes no Python call.

    :param tree: finds the receivers of channels that are not cached
    """

    def __init__(self, tree: _Tree[T]) -> None:
        self._tree = tree

    def __missing__(self, channel: str) -> tuple[T, ...]:
        if len(self) >= _MAX_CACHED_CHANNELS:
            self.clear()
        found = self[channel] = self._tree.find(channel)
        return found


class Router(Generic[T]):
    """
    The receivers of each channel.

    :param matcher: how the broker matches
    :ivar receivers: the receivers by channel, in the order in which they were added
    """

    def __init__(self, matcher: Matcher = "emitter") -> None:
        self._patterns: dict[T, str | None] = {}
        self._tree: _Tree[T] = _Tree(matcher)
        self._found = _Cache(self._tree)
        self._added = 0
        self.receivers: Mapping[str, tuple[T, ...]] = self._found

    def __iter__(self) -> Iterator[T]:
        # A copy, because statistics() might iterate in another thread while receivers change.
        return iter(tuple(self._patterns))

    def add(self, receiver: T, pattern: str | None) -> None:
        """Add a receiver with the channel of its subscription; ``None`` matches every channel."""
        self._patterns[receiver] = pattern
        self._added += 1
        self._tree.add(receiver, pattern, self._added)
        self._found.clear()

    def discard(self, receiver: T) -> None:
        """Remove a receiver if it is present."""
        if receiver in self._patterns:
            self._tree.remove(receiver, self._patterns.pop(receiver))
            self._found.clear()


class Routes(Generic[T]):
    """
    The receivers of each event, by channel.

    :param matcher: how the broker matches
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher: Matcher = matcher
        self.messages: Router[T] = Router(matcher)
        self._others: dict[str, Router[T]] = {}

    def add(self, event: str, receiver: T, channel: str | None) -> None:
        """Add a receiver of an event on a channel; ``None`` matches every channel."""
        self._router(event).add(receiver, channel)

    def discard(self, event: str, receiver: T) -> None:
        """Remove a receiver of an event."""
        self._router(event).discard(receiver)

    def reached(self, event: str, channel: str = "/") -> tuple[T, ...]:
        """
        Return the receivers of an event.

        :param channel: the channel of the event; any channel if the event has none
        """
        router = self.messages if event == "message" else self._others.get(event)
        return () if router is None else router.receivers[channel]

    def __iter__(self) -> Iterator[T]:
        # Copies, because statistics() might iterate in another thread while receivers change.
        for router in (self.messages, *tuple(self._others.values())):
            yield from router

    def _router(self, event: str) -> Router[T]:
        if event == "message":
            return self.messages
        router = self._others.get(event)
        if router is None:
            router = self._others[event] = Router(self.matcher)
        return router
