"""Which subscriptions a channel reaches, under the broker's two matchers."""

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
        self.here: dict[T, None] = {}  # a set that keeps its order

    def grandchildren(self, word: str) -> Iterable[tuple[str, _Node[T]]]:
        child = self.children.get(word)
        return () if child is None else child.children.items()


class Trie(Generic[T]):
    """
    Filters, each with those who hold it.

    :param matcher: ``"emitter"``: a filter reaches all channels that begin with it, and ``#`` none;
        ``"mqtt"``: a filter reaches channels of its own length, and ``#`` one or more levels more.
        ``+`` is one level in both.
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
        """Take a filter from one who holds it."""
        path = [self._root]
        for word in words:
            path.append(path[-1].children[word])
        del path[-1].here[holder]
        for word in reversed(words):
            if path[-1].here or path[-1].children:
                break
            path.pop()
            del path[-1].children[word]

    def match(self, words: Words) -> dict[T, None]:
        """Give those whose filters a channel reaches, each once."""
        found: dict[T, None] = {}
        self._collect(self._root, words, found)
        return found

    def match_below(self, word: str, words: Words) -> dict[str, dict[T, None]]:
        """
        Match the filters that begin with a word and any second one, without these two.

        :return: by their second word, the holders whose filters a channel reaches, if there are any
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
    The filters of subscribers. Those below ``$share/group/`` share what reaches them.

    :param matcher: as for :class:`Trie`
    """

    def __init__(self, matcher: Matcher = "emitter") -> None:
        self._filters: Trie[T] = Trie(matcher)

    def add(self, words: Words, subscriber: T) -> None:
        self._filters.add(words, subscriber)

    def remove(self, words: Words, subscriber: T) -> None:
        """Take a filter from a subscriber that holds it."""
        self._filters.remove(words, subscriber)

    def match(self, words: Words) -> dict[T, None]:
        """Give the subscribers whose filters a channel reaches, groups aside."""
        return self._filters.match(words)

    def groups(self, words: Words) -> dict[str, dict[T, None]]:
        """Give each group that has members whose filters a channel reaches, with these members."""
        return self._filters.match_below("$share", words)

    def receivers(
        self,
        words: Words,
        excluded: T | None = None,
        elsewhere: Mapping[T, Subscriptions[T]] | None = None,
    ) -> list[T]:
        """
        Give who gets a message, each once: of every group, one member at random.

        :param elsewhere: who else gets it if one of these subscriptions matches: in each group that
            has members there, it is one member
        """
        found, groups = self._filters.match(words), self.groups(words)
        for holder, subscriptions in (elsewhere or {}).items():
            if subscriptions.match(words):
                found[holder] = None
            for name in subscriptions.groups(words):
                groups.setdefault(name, {})[holder] = None
        found.pop(excluded, None)  # type: ignore[arg-type]  # None is never there
        for members in groups.values():
            members.pop(excluded, None)  # type: ignore[arg-type]  # as above
            if members:
                found[random.choice(list(members))] = None
        return list(found)


# Both go down level by level, because a channel may have more levels than Python allows recursion.


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
