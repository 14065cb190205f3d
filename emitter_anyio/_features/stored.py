"""The requests that read stored messages without missing any node of the broker. No I/O.

The node that gets a request sends it to the other nodes, and merges the answers. The answer of each
node holds its newest messages. It ends at the limit of the request, at 64 KiB, or before a message
that alone is larger than that. So a page proves how far each node in it has been read. It proves
nothing about a node that is absent from it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias, TypeVar

from emitter_anyio._values.channels import level_hash
from emitter_anyio._values.messages import StoredMessage

T = TypeVar("T")

_FIRST_SECOND: Final = 1514764800
"""The ids count seconds from here: 2018-01-01."""
_MAX_UINT32: Final = 0xFFFFFFFF

_LEAST: Final = 16
_USUAL: Final = 128
_MOST: Final = 1024
"""The number of messages to request: of the first page at least and at most, and of any page."""
_ANSWER_BYTES: Final = 65536
"""The size limit of the broker's answer, in JSON, and of the answer of each node, in bytes."""
_PAGE_BYTES: Final = 40000
"""The size in JSON that a page should have, if its messages are as large as those before."""
_CERTAIN_BYTES: Final = 16384
"""A node that returned at most this many bytes has no further message that can be sent."""
_SKEW: Final = 2
"""Seconds by which the clocks of nodes may differ."""

TOO_LARGE: Final = "a stored message is too large for the broker to send (64 KiB)"
HIDDEN: Final = "a stored message is so large (64 KiB) that a node shows none of those before it"
CROWDED: Final = "the nodes have more messages within one second than the broker can send together"
EXPIRED: Final = "a stored message expired while those after it were being read"
SLOW: Final = "the broker took 2 s, so one of its nodes might not have answered"


class Look(NamedTuple):
    """
    A request for the newest messages of a window.

    :ivar last: the maximum number of messages
    :ivar since: the oldest second of the window, in unix time; ``None`` for no bound
    :ivar until: the newest second of the window
    :ivar cursor: the id of a message; only older messages are returned. A node that does not store
        that message skips the next older one
    """

    last: int
    since: int | None
    until: int | None
    cursor: bytes | None = None


class Census(NamedTuple):
    """A request that takes long if the broker has several nodes: a status of presence."""


class Answer(NamedTuple):
    """
    The outcome of a request.

    :ivar messages: ``None`` if the answer was too large for the broker to send
    :ivar slow: whether it took so long that the broker must have waited for other nodes
    """

    messages: Sequence[StoredMessage] | None
    slow: bool = False


class Unread(NamedTuple):
    """A window with messages that cannot be read; both bounds are unix seconds within it."""

    since: int
    until: int
    reason: str


@dataclass
class Known:
    """
    What the stored messages have shown of a broker.

    :ivar contract: the part of the ids that depends on the licence
    :ivar has_several_nodes: whether two nodes have stored messages at the same time
    """

    contract: int | None = None
    has_several_nodes: bool = False

    def note_contract(self, contract: int) -> None:
        """Note the licence's part of an id."""
        self.contract = contract

    def note_several_nodes(self) -> None:
        """Note that nodes were at work at the same time."""
        self.has_several_nodes = True


Steps: TypeAlias = Generator[Look | Census | StoredMessage | Unread, Answer, T]


def second_of(message: StoredMessage) -> int:
    return int(message.time.timestamp())


def _age(message: StoredMessage) -> bytes:
    """Return the sort key of a message: second, counter of the node, node; the newest is first."""
    return message.id[4:16]


def _node(message: StoredMessage) -> bytes:
    return message.id[12:16]


def _bytes(messages: Iterable[StoredMessage]) -> int:
    return sum(len(m.id) + len(m.channel) + len(m.binary) for m in messages)


def _json_bytes(messages: Iterable[StoredMessage]) -> int:
    # In base64, with {"id":"","channel":"","payload":""},
    return sum(
        36 + 4 * -(-len(m.id) // 3) + len(m.channel) + 4 * -(-len(m.binary) // 3) for m in messages
    )


def _behind(message: StoredMessage) -> bytes:
    """Make a cursor that no node stores: each node skips its next message after this one."""
    return message.id + b"\0"


@dataclass(frozen=True, slots=True)
class _Page:
    """
    The messages of an answer, the newest first.

    :ivar full: whether the broker might have cut it at the requested number of messages
    """

    messages: list[StoredMessage]
    full: bool

    @property
    def oldest(self) -> int:
        """The oldest second of the page; a full page might lack any message of that second."""
        return second_of(self.messages[-1])

    def by_node(self) -> dict[bytes, list[StoredMessage]]:
        nodes: dict[bytes, list[StoredMessage]] = {}
        for message in self.messages:
            nodes.setdefault(_node(message), []).append(message)
        return nodes

    def sure(self) -> list[StoredMessage]:
        """Return the messages of which no newer one of the same node is missing."""
        if not self.full or len(self.by_node()) == 1:
            return self.messages
        return [message for message in self.messages if second_of(message) > self.oldest]

    def misses(self, message: StoredMessage, newest: StoredMessage | None) -> bool:
        """
        Tell whether the page lacks a message that it should have.

        :param newest: the newest message of the same node in the page
        """
        if self.full and second_of(message) <= self.oldest:
            return False
        return newest is None or _age(message) < _age(newest)


class _Shown(NamedTuple):
    """The page of a window, and the newest message of each node in that window."""

    page: _Page
    newest: dict[bytes, StoredMessage]
    until: int | None


class Reading:
    """
    One pass over the stored messages of a channel, as a sequence of requests and results.

    The newest second comes first, and within a second the newest message of each node. The reading
    leaves a second when it has read each node that is known to have messages there to its end.

    :param last: the maximum number of messages; a message that cannot be read counts, too
    :param since: the oldest second, or ``None``
    :param until: the newest second, or ``None``
    :param now: the current second of the local clock, at which a search begins
    :param broker: what is known of the broker; the reading adds to it
    :param level: the first level of the channel
    """

    def __init__(
        self,
        last: int,
        since: int | None,
        until: int | None,
        now: int,
        broker: Known,
        level: str,
    ) -> None:
        self._left = last
        self._since = since
        self._until = until
        self._now = now
        self._oldest = _FIRST_SECOND if since is None else since
        self._size = max(_LEAST, min(_USUAL, last + 1))
        self._broker = broker
        self._level = level_hash(level)
        self._given: dict[bytes, list[StoredMessage]] = {}
        """By node: the last two messages yielded, or one if they are of different seconds."""
        self._json_bytes = 0, 0
        """A second, and the size in JSON of the messages that were yielded from it."""
        self._spans: dict[bytes, tuple[int, int]] = {}
        """By node: the oldest and the newest second of its messages."""
        self._doubtful: list[int] = []
        """Seconds in which one node filled each answer, so that another one might be missing."""
        self._before: _Shown | None = None
        self._told: int | None = None
        """The last second that was reported as not fully readable."""
        self._counted: bool | None = None
        """The result of the census, if there was one."""
        self._slow = False

    def steps(self) -> Steps[None]:
        """Yield requests, each to be answered, and between them messages and unreadable windows."""
        until = self._until
        cursors: list[bytes] = []
        slow_from: list[int | None] = []
        while self._left > 0 and (until is None or until >= self._oldest):
            begin, self._slow = until, False
            until, cursors = yield from self._read_on(until, cursors)
            if self._slow:
                slow_from.append(begin)
            elif slow_from:
                yield self._unread(begin, slow_from[0], SLOW)
                slow_from.clear()
            if self._has_several_nodes() and self._doubtful:
                yield Unread(min(self._doubtful), max(self._doubtful), CROWDED)
                self._doubtful.clear()
        if slow_from:
            yield self._unread(until, slow_from[0], SLOW)

    def _read_on(
        self, until: int | None, cursors: list[bytes]
    ) -> Steps[tuple[int | None, list[bytes]]]:
        """
        Read the newest messages of what is left.

        :param until: the newest second that is left
        :param cursors: the places where a large message might hide a node; if there are none, the
            newest place of the window
        :return: ``until`` and ``cursors`` of the next call
        """
        before, self._before = self._before, None
        page = yield from self._ask(self._since, until)
        if page is None:
            return (yield from self._pass_large(until)), []
        hidden, floor = yield from self._look_behind(page, until, cursors)
        nodes = _Page(page.messages + hidden, False).by_node()
        if not nodes:
            return (yield from self._search(until)), []
        shown = {node: messages[0] for node, messages in nodes.items()}
        if before is not None:
            yield from self._compare(before, shown.values())
        if not self._slow:
            self._before = _Shown(page, shown, until)
        newest = max(second_of(messages[0]) for messages in nodes.values())
        # Each node in the page has been read at least to the end of this second.
        end = max(floor, *(second_of(messages[-1]) for messages in nodes.values()))
        yield from self._give(m for m in page.sure() + hidden if second_of(m) >= end)
        if not page.full and not floor and all(_is_certain(each) for each in nodes.values()):
            ends = [messages[-1] for messages in nodes.values()]
            return end - 1, [_behind(each) for each in ends if second_of(each) == end]
        if end == newest:
            there = [node for node, messages in nodes.items() if second_of(messages[0]) == end]
            return end - 1, (yield from self._finish_second(end, page, there))
        return end, []

    def _ask(
        self,
        since: int | None,
        until: int | None,
        cursor: bytes | None = None,
        size: int | None = None,
    ) -> Steps[_Page | None]:
        """
        Request a page.

        :param size: the number of messages; by default as many as should fit into an answer, and
            fewer if they do not fit
        :return: ``None`` if the broker cannot send the answer: without ``size``, not even one
            message
        """
        asked = self._size if size is None else size
        while True:
            answer = yield Look(asked, since, until, cursor)
            self._slow |= answer.slow
            if answer.messages is not None:
                break
            if asked == 1 or size is not None:
                return None
            self._size = asked = asked // 2
        found = {m.id: m for m in answer.messages if _is_within(second_of(m), since, until)}
        page = _Page(sorted(found.values(), key=_age), 0 < len(found) >= asked)
        for message in page.messages:
            self._note(message)
        if size is None and page.messages:
            fitting = _PAGE_BYTES * len(page.messages) // _json_bytes(page.messages)
            self._size = max(1, min(2 * asked, fitting, _MOST))
        return page

    def _cursor(self, until: int | None) -> bytes:
        """Make a cursor that no node stores, just before the newest place of the window."""
        assert self._broker.contract is not None
        time = 0 if until is None else _MAX_UINT32 - (until - _FIRST_SECOND)
        words = (self._broker.contract ^ self._level, time, 0, 0)
        return b"".join(word.to_bytes(4, "big") for word in words)

    def _unread(self, since: int | None, until: int | None, reason: str) -> Unread:
        newest = max((span[1] for span in self._spans.values()), default=self._oldest)
        begin = self._oldest if since is None else max(self._oldest, since)
        return Unread(begin, max(self._now, newest) if until is None else until, reason)

    def _note(self, message: StoredMessage) -> None:
        second, node = second_of(message), _node(message)
        self._broker.note_contract(int.from_bytes(message.id[:4], "big") ^ self._level)
        oldest, newest = self._spans.get(node, (second, second))
        self._spans[node] = min(oldest, second), max(newest, second)

    def _has_several_nodes(self) -> bool:
        # A node has another name after each start, so only overlapping times prove two nodes.
        spans = sorted(self._spans.values())
        if any(later[0] <= earlier[1] for earlier, later in pairwise(spans)):
            self._broker.note_several_nodes()
        return self._broker.has_several_nodes

    def _is_new(self, message: StoredMessage) -> bool:
        given = self._given.get(_node(message))
        return given is None or _age(message) > _age(given[-1])

    def _give(self, messages: Iterable[StoredMessage]) -> Steps[None]:
        for message in sorted(messages, key=_age):
            if self._left > 0 and self._is_new(message):
                self._left -= 1
                second, node = second_of(message), _node(message)
                before = [m for m in self._given.get(node, ())[-1:] if second_of(m) == second]
                self._given[node] = [*before, message]
                self._add_json(second, _json_bytes([message]))
                yield message

    def _add_json(self, second: int, size: int) -> None:
        if self._json_bytes[0] != second:
            self._json_bytes = second, 0
        self._json_bytes = second, self._json_bytes[1] + size

    # Messages that hide others

    def _look_behind(
        self, page: _Page, until: int | None, cursors: Sequence[bytes]
    ) -> Steps[tuple[list[StoredMessage], int]]:
        """
        Make each node skip one message: if that message is too large, the older ones appear.

        :return: the messages that the page should have had, and the second from which more might be
            hidden, or 0
        """
        hidden: dict[bytes, StoredMessage] = {}
        floor = 0
        if self._broker.contract is None or self._slow:
            return [], floor
        shown = {node: messages[0] for node, messages in page.by_node().items()}
        again: _Page | None = None
        for cursor in cursors or [self._cursor(until)]:
            upper = _second_in(cursor) if cursors else until
            behind = yield from self._ask(self._since, upper, cursor)
            if behind is None:
                continue
            if behind.full:
                floor = max(floor, behind.oldest if until is None else min(behind.oldest, until))
            missed = [
                message
                for message in behind.sure() or behind.messages
                if self._is_new(message)
                and message.id not in hidden
                and page.misses(message, shown.get(_node(message)))
            ]
            if missed and again is None:
                again = yield from self._ask(self._since, until)
            if again is not None:
                # Messages that were stored since the first page are in this one.
                newest = {node: messages[0] for node, messages in again.by_node().items()}
                missed = [m for m in missed if again.misses(m, newest.get(_node(m)))]
            if missed:
                if self._told != second_of(missed[0]):
                    yield from self._tell_hidden(missed[0], upper)
                hidden.update((message.id, message) for message in missed)
        return sorted(hidden.values(), key=_age), floor

    def _compare(self, before: _Shown, shown: Iterable[StoredMessage]) -> Steps[None]:
        """Report messages that were missing in the page before: something hid them there."""
        # Messages as new as the newest might have been stored between the two requests.
        newest = max(span[1] for span in self._spans.values())
        missed = [
            second_of(message)
            for message in shown
            if self._is_new(message)
            and before.page.misses(message, before.newest.get(_node(message)))
            and self._told != second_of(message) < newest - _SKEW
        ]
        if missed:
            yield from self._skip(max(missed), before.until, HIDDEN)

    def _tell_hidden(self, behind: StoredMessage, until: int | None) -> Steps[None]:
        def is_older(second: int) -> Steps[bool]:
            page = yield from self._ask(self._since, second)
            return page is None or page.full or bool(_of(page, _node(behind)))

        # The hiding message is in the first second from which the node is absent.
        since = second_of(behind)
        last = since
        if until is None or since < until:
            last = (yield from self._find_last(until, is_older, since)) or since
        until = last + 1 if until is None else min(last + 1, until)
        yield from self._skip(since, until, HIDDEN)

    def _skip(self, since: int | None, until: int | None, reason: str) -> Steps[None]:
        self._left -= 1
        yield self._unread(since, until, reason)

    def _pass_large(self, until: int | None) -> Steps[int]:
        """Skip the newest message, which cannot be sent, and read the rest of its second."""

        def is_within(second: int) -> Steps[bool]:
            return (yield from self._ask(second, until, size=1)) is None

        second = yield from self._find_last(until, is_within)
        if second is None:
            yield from self._skip(self._since, until, TOO_LARGE)
            return self._oldest - 1
        yield from self._skip(second, until, TOO_LARGE)
        self._told = second
        if self._broker.contract is not None:
            page = yield from self._ask(second, second, self._cursor(second))
            if page is not None and page.messages:
                yield from self._give(page.sure())
                yield from self._finish_second(second, page, list(page.by_node()))
        return second - 1

    def _search(self, until: int | None) -> Steps[int | None]:
        """
        Search for messages that large ones hide, where an answer was empty.

        An empty answer alone proves nothing: one message of more than 64 KiB hides all before it. A
        search takes some 30 small requests, at distances that double, so it can miss messages that
        were all stored within a short time long ago.
        """
        contract = self._broker.contract
        if self._slow:
            return self._oldest - 1

        def shows_any(second: int) -> Steps[bool]:
            page = yield from self._ask(self._since, second, size=1)
            return page is None or bool(page.messages)

        second = yield from self._find_last(until, shows_any)
        if second is None:
            return self._oldest - 1
        if contract is None and self._broker.contract is not None:
            # The contract is known now, so a cursor can skip the message that hides them.
            return until
        yield from self._skip(second + 1, until, HIDDEN)
        return second

    def _find_last(
        self, until: int | None, holds: Callable[[int], Steps[bool]], found: int | None = None
    ) -> Steps[int | None]:
        """
        Find the last second for which a condition holds: in growing steps, then by bisecting.

        :param holds: the condition
        :param found: a second for which it holds
        :return: the last second found
        """
        top = _MAX_UINT32 if until is None else until
        probe = min(top, max(self._oldest, self._now) if found is None else found) + 1
        probe, step = min(top, probe), 1
        count = 0
        while True:
            if (yield from holds(probe)):
                found = probe
            else:
                top = probe - 1
            if top <= (self._oldest - 1 if found is None else found):
                return found
            count += 1
            step *= 1 if count <= 3 else 2 if found is None else 4
            if found is None:
                probe = max(self._oldest, top - step + 1)
            else:
                probe = min(found + step, (found + top + 1) // 2)

    # One second

    def _finish_second(self, second: int, page: _Page, nodes: list[bytes]) -> Steps[list[bytes]]:
        """
        Read a second to its end.

        :param page: what has been read of the second
        :param nodes: the nodes that have messages in the second
        :return: cursors after the last message of each node
        """
        crowded = page.full and page.oldest == second
        if crowded and self._left > 0:
            whole = yield from self._ask(second, second, size=_MOST)
            if whole is not None:
                page, crowded = whole, whole.full
                nodes += [node for node in whole.by_node() if node not in nodes]
                yield from self._give(whole.sure())
        for node in nodes:
            if not _is_end(page, node):
                crowded |= yield from self._finish_node(second, node, nodes)
        if crowded and self._told != second:
            found = self._json_bytes[1] if self._json_bytes[0] == second else 0
            unexplained = self._left > 0 and found < _ANSWER_BYTES - 4096
            if unexplained or (yield from self._may_hide_nodes()):
                self._told = second
                yield Unread(second, second, CROWDED)
            else:
                self._doubtful.append(second)
        return [
            _behind(given[-1])
            for node in nodes
            if (given := self._given.get(node)) and second_of(given[-1]) == second
        ]

    def _may_hide_nodes(self) -> Steps[bool]:
        """Tell whether there might be nodes beside the one that fills an answer."""
        if self._counted is None and not self._has_several_nodes():
            self._counted = (yield Census()).slow
        return bool(self._counted) or self._has_several_nodes()

    def _finish_node(self, second: int, node: bytes, nodes: list[bytes]) -> Steps[bool]:
        """
        Read the messages of one node in a second.

        :param nodes: the nodes that are known to have messages in it; others are added
        :return: whether messages of other nodes might have displaced some
        """
        crowded = False
        given = [m for m in self._given.get(node, ()) if second_of(m) == second]
        last = given[-1] if given else None
        anchor = given[0].id if len(given) > 1 else None
        while self._left > 0:
            page = None
            if last is None or self._size > 1:
                page = yield from self._ask(second, second, anchor)
                if anchor is not None and last not in _of(page, node):
                    # The last message has expired. If the anchor has, too, one was skipped.
                    page = yield from self._ask(second, second)
            cursor = None if last is None else last.id
            fresh = self._new_of(page, node)
            if not (fresh or last is None or _is_end(page, node)):
                # An answer cannot hold two large messages.
                page = yield from self._ask(second, second, cursor)
                if page is None:
                    cursor = _behind(last)
                    page = yield from self._ask(second, second, cursor)
                    yield from self._skip(second, second, TOO_LARGE)
                    self._told = second
                    fresh = self._new_of(page, node)
                elif fresh := self._new_of(page, node):
                    proof = yield from self._ask(second, second, anchor, size=1)
                    if last not in _of(proof, node):
                        if len(nodes) == 1:
                            yield Unread(second, second, EXPIRED)
                        crowded |= len(nodes) > 1
            if page is not None:
                others = [other for other in page.by_node() if other != node]
                unknown = [other for other in others if other not in nodes]
                nodes += unknown
                crowded |= bool(unknown) or (page.full and bool(others))
            yield from self._give(fresh)
            if not fresh or _is_end(page, node):
                break
            anchor = fresh[-2].id if len(fresh) > 1 else cursor
            last = fresh[-1]
        return crowded

    def _new_of(self, page: _Page | None, node: bytes) -> list[StoredMessage]:
        return [message for message in _of(page, node) if self._is_new(message)]


def _of(page: _Page | None, node: bytes) -> list[StoredMessage]:
    return [] if page is None else page.by_node().get(node, [])


def _is_end(page: _Page | None, node: bytes) -> bool:
    """Tell whether a node has no further message that can be sent."""
    return page is not None and not page.full and _is_certain(_of(page, node))


def _is_certain(messages: Sequence[StoredMessage]) -> bool:
    return _bytes(messages) <= _CERTAIN_BYTES


def _is_within(second: int, since: int | None, until: int | None) -> bool:
    return (since is None or since <= second) and (until is None or second <= until)


def _second_in(cursor: bytes) -> int:
    return _MAX_UINT32 - int.from_bytes(cursor[4:8], "big") + _FIRST_SECOND
