"""Which subscriptions a channel reaches, as the broker decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Generic, Literal, TypeAlias, TypeVar

from ._channels import levels

Matcher: TypeAlias = Literal["emitter", "mqtt"]
"""How the broker matches: ``"emitter"``, its default, by prefix; ``"mqtt"`` as MQTT does."""

T = TypeVar("T")

_CACHE_LIMIT: Final = 4096


def reaches(pattern: str, channel: str, matcher: Matcher = "emitter") -> bool:
    """
    Tell whether a message to a channel reaches a subscription.

    Under ``"emitter"`` a subscription reaches its channel and all below it, ``+`` stands for one
    level, and ``#`` never matches anything. Under ``"mqtt"`` the levels match one by one and ``#``
    stands for the rest.

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
    """Tell whether some channel reaches both of two subscriptions."""
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


@dataclass(slots=True)
class _Node(Generic[T]):
    below: dict[str, _Node[T]] = field(default_factory=dict)
    here: dict[T, int] = field(default_factory=dict)


@lru_cache(maxsize=4096)
def _path(channel: str) -> tuple[str, ...]:
    return tuple(levels(channel))


class _Answers(dict[str, T]):
    """Answers that were given before, since messages come again and again from one channel."""

    def __init__(self, find: Callable[[str], T]) -> None:
        self._find = find

    def __missing__(self, channel: str) -> T:
        if len(self) >= _CACHE_LIMIT:
            self.clear()
        found = self[channel] = self._find(channel)
        return found


class Router(Generic[T]):
    """
    A table of receivers by the channel that they ask for; it is a tree of levels.

    :param matcher: how the broker matches

    :ivar receivers: the receivers that a channel reaches, in the order in which they were added
    """

    def __init__(self, matcher: Matcher = "emitter") -> None:
        self.matcher: Matcher = matcher
        self._patterns: dict[T, str | None] = {}
        self._everything: dict[T, int] = {}
        self._root: _Node[T] = _Node()
        self._added = 0
        self.receivers: Mapping[str, tuple[T, ...]]
        # Looking an answer up is no call, which a message would pay for.
        self.receivers = self._answers = _Answers(self._find_receivers)

    def __iter__(self) -> Iterator[T]:
        # A copy: statistics() of another thread iterates while receivers come and go.
        return iter(tuple(self._patterns))

    def add(self, receiver: T, pattern: str | None) -> None:
        """Add a receiver of what a channel reaches; ``None`` is of everything."""
        self._patterns[receiver] = pattern
        self._added += 1
        self._place(pattern, make=True)[receiver] = self._added
        self._answers.clear()

    def discard(self, receiver: T) -> None:
        """Take a receiver away."""
        if receiver not in self._patterns:
            return
        pattern = self._patterns.pop(receiver)
        del self._place(pattern)[receiver]
        if pattern is not None:
            self._prune(levels(pattern))
        self._answers.clear()

    def _find_receivers(self, channel: str) -> tuple[T, ...]:
        if not self._patterns:
            return ()
        reached = self._collect(levels(channel if channel.endswith("/") else channel + "/"))
        return tuple(sorted(reached, key=reached.__getitem__))

    def _place(self, pattern: str | None, *, make: bool = False) -> dict[T, int]:
        if pattern is None:
            return self._everything
        node = self._root
        for level in levels(pattern):
            node = node.below.setdefault(level, _Node()) if make else node.below[level]
        return node.here

    def _prune(self, path: list[str]) -> None:
        node, passed = self._root, []
        for level in path:
            passed.append((node, level))
            node = node.below[level]
        while passed and not node.here and not node.below:
            node, level = passed.pop()
            del node.below[level]

    def _collect(self, path: list[str]) -> dict[T, int]:
        reached = dict(self._everything)
        nodes = [self._root]
        for depth in range(len(path) + 1):
            at_end = depth == len(path)
            for node in nodes:
                if at_end or self.matcher == "emitter":
                    reached.update(node.here)
                if self.matcher == "mqtt" and (rest := node.below.get("#")):
                    reached.update(rest.here)
            names = () if at_end else dict.fromkeys((path[depth], "+"))
            nodes = [node.below[name] for node in nodes for name in names if name in node.below]
        return reached


class Routes(Generic[T]):
    """
    The receivers of each event, by the channel that they ask for.

    :param matcher: how the broker matches
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher: Matcher = matcher
        self.messages: Router[T] = Router(matcher)
        self._others: dict[str, Router[T]] = {}

    def add(self, event: str, receiver: T, channel: str | None) -> None:
        """Add a receiver of an event; ``None`` stands for every channel."""
        self._router(event).add(receiver, channel)

    def discard(self, event: str, receiver: T) -> None:
        """Remove a receiver of an event."""
        self._router(event).discard(receiver)

    def reached(self, event: str, channel: str = "/") -> tuple[T, ...]:
        """
        Return the receivers of an event.

        :param channel: the event's channel; receivers of events without one ask for every channel
        """
        return self._router(event).receivers[channel]

    def __iter__(self) -> Iterator[T]:
        # Copies: statistics() in another thread iterates while receivers come and go.
        for router in (self.messages, *tuple(self._others.values())):
            yield from router

    def _router(self, event: str) -> Router[T]:
        if event == "message":
            return self.messages
        router = self._others.get(event)
        if router is None:
            router = self._others[event] = Router(self._matcher)
        return router
