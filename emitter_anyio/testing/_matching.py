"""The broker's two matchers of channels and subscriptions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    from ._topics import Words

T = TypeVar("T")
Matcher: TypeAlias = Literal["emitter", "mqtt"]


class _Node(Generic[T]):
    __slots__ = ("children", "here")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.here: dict[T, None] = {}  # an ordered set

    def grandchildren(self, word: str) -> Iterable[tuple[str, _Node[T]]]:
        child = self.children.get(word)
        return () if child is None else child.children.items()


class Trie(Generic[T]):
    """
    A tree of filters and their holders.

    :param matcher: with ``"emitter"``, a filter matches all channels that begin with it, and ``#``
        matches nothing; with ``"mqtt"``, a filter matches channels of the same length, and ``#``
        matches one or more further levels. ``+`` always matches one level
    """

    def __init__(self, matcher: Matcher = "emitter") -> None:
        self._root: _Node[T] = _Node()
        self._collect: Callable[[_Node[T], Words, dict[T, None]], None]
        self._collect = _by_prefix if matcher == "emitter" else _by_length

    def add(self, words: Words, holder: T) -> None:
        node = self._root
        for word in words:
            node = node.children.setdefault(word, _Node())
        node.here[holder] = None

    def remove(self, words: Words, holder: T) -> None:
        """Remove an existing filter of a holder."""
        path = [self._root]
        for word in words:
            path.append(path[-1].children[word])
        del path[-1].here[holder]
        for word in reversed(words):
            if path[-1].here or path[-1].children:
                break
            path.pop()
            del path[-1].children[word]

    def holds(self, words: Words, holder: T) -> bool:
        """Return whether a holder has a filter."""
        node = self._root
        for word in words:
            child = node.children.get(word)
            if child is None:
                return False
            node = child
        return holder in node.here

    def holders(self) -> list[T]:
        """Return all holders, each once."""
        found: dict[T, None] = {}
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            found.update(node.here)
            nodes += node.children.values()
        return list(found)

    def match(self, words: Words) -> dict[T, None]:
        """Return the holders of matching filters, each once."""
        found: dict[T, None] = {}
        self._collect(self._root, words, found)
        return found

    def match_below(self, word: str, words: Words) -> dict[str, dict[T, None]]:
        """
        Match the filters that begin with a word, ignoring this and the next word.

        :return: the holders of matching filters, by the second word of the filters
        """
        found: dict[str, dict[T, None]] = {}
        for name, node in self._root.grandchildren(word):
            holders: dict[T, None] = {}
            self._collect(node, words, holders)
            if holders:
                found[name] = holders
        return found


class Subscriptions(Generic[T]):
    """
    The filters of subscribers. Filters below ``$share/NAME/`` form a share group.

    :param matcher: as for :class:`Trie`
    """

    def __init__(self, matcher: Matcher = "emitter") -> None:
        self._filters: Trie[T] = Trie(matcher)
        self._count = 0

    @property
    def count(self) -> int:
        """The number of filters of all subscribers."""
        return self._count

    def add(self, words: Words, subscriber: T) -> None:
        """Add a new filter of a subscriber."""
        self._filters.add(words, subscriber)
        self._count += 1

    def remove(self, words: Words, subscriber: T) -> None:
        """Remove an existing filter of a subscriber."""
        self._filters.remove(words, subscriber)
        self._count -= 1

    def holds(self, words: Words, subscriber: T) -> bool:
        """Return whether a subscriber has a filter."""
        return self._filters.holds(words, subscriber)

    def subscribers(self) -> list[T]:
        """Return all subscribers, each once."""
        return self._filters.holders()

    def match(self, words: Words) -> dict[T, None]:
        """Return the subscribers with matching filters, without groups."""
        return self._filters.match(words)

    def groups(self, words: Words) -> dict[str, dict[T, None]]:
        """Return the members with matching filters, by group."""
        return self._filters.match_below("$share", words)

    def receivers(
        self,
        words: Words,
        excluded: T | None = None,
        other_nodes: Mapping[T, Subscriptions[T]] | None = None,
    ) -> list[T]:
        """
        Return the receivers of a message, each once, with one random member of each group.

        :param excluded: a subscriber that does not receive the message
        :param other_nodes: further receivers and the subscriptions for which they receive it; for
            each group in these subscriptions, the receiver is one member
        """
        found, groups = self._filters.match(words), self.groups(words)
        for holder, subscriptions in (other_nodes or {}).items():
            if subscriptions.match(words):
                found[holder] = None
            for name in subscriptions.groups(words):
                groups.setdefault(name, {})[holder] = None
        found.pop(excluded, None)  # type: ignore[arg-type]  # None is never a key
        for members in groups.values():
            members.pop(excluded, None)  # type: ignore[arg-type]  # as above
            if members:
                found[random.choice(list(members))] = None
        return list(found)


# These functions are iterative, because a channel may have more levels than Python's stack.


def _by_prefix(root: _Node[T], words: Words, found: dict[T, None]) -> None:
    nodes = [root]
    found.update(root.here)
    for word in words:
        nodes = _below(nodes, word)
        for node in nodes:
            found.update(node.here)


def _by_length(root: _Node[T], words: Words, found: dict[T, None]) -> None:
    nodes = [root]
    for word in words:
        for node in nodes:
            if tail := node.children.get("#"):
                found.update(tail.here)
        nodes = _below(nodes, word)
    for node in nodes:
        found.update(node.here)


def _below(nodes: list[_Node[T]], word: str) -> list[_Node[T]]:
    return [child for node in nodes for name in (word, "+") if (child := node.children.get(name))]
