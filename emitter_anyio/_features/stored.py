"""The requests that read stored messages without missing any node of the broker. No I/O.

The node that receives a request sends it to the other nodes and merges their replies (the broker's
``message/message.go``). The reply of each node has its newest messages. It ends at the limit of the
request, at 64 KiB, or before a message that alone is larger than that. So a page proves how far it
has read each node whose messages it has, and nothing about other nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias, TypeVar

from emitter_anyio._values.channels import level_hash
from emitter_anyio._values.messages import StoredMessage

T = TypeVar("T")

ID_EPOCH: Final = 1514764800
"""The unix second from which message ids count: 2018-01-01."""
_MAX_UINT32: Final = 0xFFFFFFFF

_MIN_FIRST_PAGE_MESSAGES: Final = 16
_MAX_FIRST_PAGE_MESSAGES: Final = 128
_MAX_PAGE_MESSAGES: Final = 1024
"""The number of messages to request: for the first page at least and at most, and for any page."""
_MAX_REPLY_BYTES: Final = 65536
"""The size limit of the broker's reply, in JSON, and of the reply of each node, in bytes."""
_TARGET_PAGE_BYTES: Final = 40000
"""The intended size of a page in JSON, estimated by the size of the messages before it."""
_COMPLETE_NODE_BYTES: Final = 16384
"""A node that returned at most this many bytes has no further message that can be sent."""
_CLOCK_SKEW_SECONDS: Final = 2
"""The time by which the clocks of nodes may differ."""

TOO_LARGE: Final = "a stored message is too large for the broker to send (64 KiB)"
HIDDEN: Final = "a stored message is so large (64 KiB) that its node returns no older messages"
CROWDED: Final = "the nodes stored more messages within one second than one reply can contain"
EXPIRED: Final = "a stored message expired while newer messages were being read"
SLOW: Final = "the broker took at least 1.9 s to reply, so one of its nodes might not have replied"


class PageRequest(NamedTuple):
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


class NodeProbe(NamedTuple):
    """A request that takes 1 s if the broker has several nodes: a presence status."""


class Reply(NamedTuple):
    """
    The reply to a request.

    :ivar messages: the messages; ``None`` if the reply was too large for the broker to send
    :ivar slow: whether the reply took so long that the broker must have waited for other nodes
    """

    messages: Sequence[StoredMessage] | None
    slow: bool = False


class Unreadable(NamedTuple):
    """A window with messages that cannot be read, from one unix second to another."""

    since: int
    until: int
    reason: str


@dataclass
class BrokerFacts:
    """
    The facts about a broker that stored messages have revealed.

    :ivar contract: the part of message ids that depends on the licence
    :ivar has_several_nodes: whether two nodes have stored messages during the same time
    """

    contract: int | None = None
    has_several_nodes: bool = False

    def note_contract(self, contract: int) -> None:
        """Note the part of an id that depends on the licence."""
        self.contract = contract

    def note_several_nodes(self) -> None:
        """Note that two nodes have stored messages during the same time."""
        self.has_several_nodes = True


Steps: TypeAlias = Generator[PageRequest | NodeProbe | StoredMessage | Unreadable, Reply, T]


def advance(
    steps: Steps[None], reply: Reply | None = None
) -> PageRequest | NodeProbe | StoredMessage | Unreadable | None:
    """
    Continue a sequence of requests and results.

    :param reply: the reply to the last step, if that is a request
    :return: the next step; ``None`` at the end
    """
    try:
        return next(steps) if reply is None else steps.send(reply)
    except StopIteration:
        return None


def second_of(message: StoredMessage) -> int:
    """Return the Unix second in which a message was stored."""
    return int(message.time.timestamp())


def _sort_key(message: StoredMessage) -> bytes:
    """Return the sort key of a message: second, counter of the node, node; newest first."""
    return message.id[4:16]


def _node_of(message: StoredMessage) -> bytes:
    return message.id[12:16]


def _size_bytes(messages: Iterable[StoredMessage]) -> int:
    return sum(len(m.id) + len(m.channel) + len(m.binary) for m in messages)


def _json_size(messages: Iterable[StoredMessage]) -> int:
    # Ids and payloads are sent in base64, within {"id":"","channel":"","payload":""},
    return sum(
        36 + 4 * -(-len(m.id) // 3) + len(m.channel) + 4 * -(-len(m.binary) // 3) for m in messages
    )


def _cursor_after(message: StoredMessage) -> bytes:
    """Make a cursor after a message. No node stores it, so each node skips its next message."""
    return message.id + b"\0"


@dataclass(frozen=True, slots=True)
class _Page:
    """
    The messages of a reply, newest first.

    :ivar full: whether the broker might have cut the reply at the requested number of messages
    """

    messages: list[StoredMessage]
    full: bool

    @property
    def oldest(self) -> int:
        """The oldest second of the page, of which a full page might lack any message."""
        return second_of(self.messages[-1])

    def by_node(self) -> dict[bytes, list[StoredMessage]]:
        nodes: dict[bytes, list[StoredMessage]] = {}
        for message in self.messages:
            nodes.setdefault(_node_of(message), []).append(message)
        return nodes

    def certain(self) -> list[StoredMessage]:
        """Return the messages before which no newer message of the same node is missing."""
        if not self.full or len(self.by_node()) == 1:
            return self.messages
        return [message for message in self.messages if second_of(message) > self.oldest]

    def lacks(self, message: StoredMessage, newest: StoredMessage | None) -> bool:
        """
        Return whether the page lacks a message that it should have.

        :param newest: the newest message of the same node in the page
        """
        if self.full and second_of(message) <= self.oldest:
            return False
        return newest is None or _sort_key(message) < _sort_key(newest)


class _WindowPage(NamedTuple):
    """A page of a window, and the newest message of each node in the window."""

    page: _Page
    newest: dict[bytes, StoredMessage]
    until: int | None


class Reading:
    """
    One pass over the stored messages of a channel, as a sequence of requests and results.

    It starts with the newest second, and within a second with the newest message of each node. It
    continues with an older second when it has read, to its end, each node that is known to have
    messages in the second.

    :param last: the maximum number of messages, including messages that cannot be read
    :param since: the oldest second, in unix time; ``None`` for no bound
    :param until: the newest second, in unix time; ``None`` for no bound
    :param now: the current unix second of the local clock, where a search starts
    :param broker: the known facts about the broker, to which the reading adds
    :param level: the first level of the channel
    """

    def __init__(
        self,
        last: int,
        since: int | None,
        until: int | None,
        now: int,
        broker: BrokerFacts,
        level: str,
    ) -> None:
        self._remaining = last
        self._since = since
        self._until = until
        self._now = now
        self._oldest = ID_EPOCH if since is None else since
        self._size = max(_MIN_FIRST_PAGE_MESSAGES, min(_MAX_FIRST_PAGE_MESSAGES, last + 1))
        self._broker = broker
        self._level = level_hash(level)
        self._yielded: dict[bytes, list[StoredMessage]] = {}
        """By node: the last two yielded messages, or one if they are from different seconds."""
        self._yielded_json = 0, 0
        """A second, and the size in JSON of the messages of that second that were yielded."""
        self._spans: dict[bytes, tuple[int, int]] = {}
        """By node: the oldest and the newest second of its messages."""
        self._doubtful_seconds: list[int] = []
        """The seconds in which one node filled every reply, so that others might be missing."""
        self._previous: _WindowPage | None = None
        self._incomplete_second: int | None = None
        """The last second that was reported as incomplete."""
        self._probe_result: bool | None = None
        """The result of the probe, if one was made."""
        self._slow = False

    def steps(self) -> Steps[None]:
        """Yield messages, unreadable windows, and requests to which a reply must be sent."""
        until = self._until
        cursors: list[bytes] = []
        slow_from: list[int | None] = []
        while self._remaining > 0 and (until is None or until >= self._oldest):
            begin, self._slow = until, False
            until, cursors = yield from self._read_newest(until, cursors)
            if self._slow:
                slow_from.append(begin)
            elif slow_from:
                yield self._unreadable(begin, slow_from[0], SLOW)
                slow_from.clear()
            if self._has_several_nodes() and self._doubtful_seconds:
                yield Unreadable(min(self._doubtful_seconds), max(self._doubtful_seconds), CROWDED)
                self._doubtful_seconds.clear()
        if slow_from:
            yield self._unreadable(until, slow_from[0], SLOW)

    def _read_newest(
        self, until: int | None, cursors: list[bytes]
    ) -> Steps[tuple[int | None, list[bytes]]]:
        """
        Read the newest messages of the remaining window.

        :param until: the newest remaining second
        :param cursors: the places after which a large message might hide the messages of a node; if
            empty, the newest place of the window
        :return: ``until`` and ``cursors`` for the next call
        """
        before, self._previous = self._previous, None
        page = yield from self._request_page(self._since, until)
        if page is None:
            return (yield from self._skip_large(until)), []
        hidden, floor = yield from self._find_hidden(page, until, cursors)
        nodes = _Page(page.messages + hidden, False).by_node()
        if not nodes:
            return (yield from self._search_hidden(until)), []
        shown = {node: messages[0] for node, messages in nodes.items()}
        if before is not None:
            yield from self._report_missing(before, shown.values())
        if not self._slow:
            self._previous = _WindowPage(page, shown, until)
        newest = max(second_of(messages[0]) for messages in nodes.values())
        # Each node in the page has been read at least down to this second.
        end = max(floor, *(second_of(messages[-1]) for messages in nodes.values()))
        yield from self._yield_new(m for m in page.certain() + hidden if second_of(m) >= end)
        if not page.full and not floor and all(_is_complete(each) for each in nodes.values()):
            ends = [messages[-1] for messages in nodes.values()]
            return end - 1, [_cursor_after(each) for each in ends if second_of(each) == end]
        if end == newest:
            there = [node for node, messages in nodes.items() if second_of(messages[0]) == end]
            return end - 1, (yield from self._finish_second(end, page, there))
        return end, []

    def _request_page(
        self,
        since: int | None,
        until: int | None,
        cursor: bytes | None = None,
        size: int | None = None,
    ) -> Steps[_Page | None]:
        """
        Request a page.

        :param size: the number of messages; by default as many as should fit into a reply, and
            fewer if they do not fit
        :return: the page; ``None`` if the broker cannot send the reply, which without ``size``
            means not even with one message
        """
        count = self._size if size is None else size
        while True:
            reply = yield PageRequest(count, since, until, cursor)
            self._slow |= reply.slow
            if reply.messages is not None:
                break
            if count == 1 or size is not None:
                return None
            self._size = count = count // 2
        found = {m.id: m for m in reply.messages if _is_within(second_of(m), since, until)}
        page = _Page(sorted(found.values(), key=_sort_key), 0 < len(found) >= count)
        for message in page.messages:
            self._note(message)
        if size is None and page.messages:
            fitting = _TARGET_PAGE_BYTES * len(page.messages) // _json_size(page.messages)
            self._size = max(1, min(2 * count, fitting, _MAX_PAGE_MESSAGES))
        return page

    def _cursor(self, until: int | None) -> bytes:
        """Make a cursor just before the newest place of the window, which no node stores."""
        assert self._broker.contract is not None
        time = 0 if until is None else _MAX_UINT32 - (until - ID_EPOCH)
        words = (self._broker.contract ^ self._level, time, 0, 0)
        return b"".join(word.to_bytes(4, "big") for word in words)

    def _unreadable(self, since: int | None, until: int | None, reason: str) -> Unreadable:
        newest = max((span[1] for span in self._spans.values()), default=self._oldest)
        begin = self._oldest if since is None else max(self._oldest, since)
        return Unreadable(begin, max(self._now, newest) if until is None else until, reason)

    def _note(self, message: StoredMessage) -> None:
        second, node = second_of(message), _node_of(message)
        self._broker.note_contract(int.from_bytes(message.id[:4], "big") ^ self._level)
        oldest, newest = self._spans.get(node, (second, second))
        self._spans[node] = min(oldest, second), max(newest, second)

    def _has_several_nodes(self) -> bool:
        # A node gets a new name at each start, so only overlapping times prove two nodes.
        spans = sorted(self._spans.values())
        if any(later[0] <= earlier[1] for earlier, later in pairwise(spans)):
            self._broker.note_several_nodes()
        return self._broker.has_several_nodes

    def _is_new(self, message: StoredMessage) -> bool:
        yielded = self._yielded.get(_node_of(message))
        return yielded is None or _sort_key(message) > _sort_key(yielded[-1])

    def _yield_new(self, messages: Iterable[StoredMessage]) -> Steps[None]:
        for message in sorted(messages, key=_sort_key):
            if self._remaining > 0 and self._is_new(message):
                self._remaining -= 1
                second, node = second_of(message), _node_of(message)
                before = [m for m in self._yielded.get(node, ())[-1:] if second_of(m) == second]
                self._yielded[node] = [*before, message]
                self._add_json(second, _json_size([message]))
                yield message

    def _add_json(self, second: int, size: int) -> None:
        if self._yielded_json[0] != second:
            self._yielded_json = second, 0
        self._yielded_json = second, self._yielded_json[1] + size

    # Messages that hide others

    def _find_hidden(
        self, page: _Page, until: int | None, cursors: Sequence[bytes]
    ) -> Steps[tuple[list[StoredMessage], int]]:
        """
        Make each node skip one message, to reveal older messages if that message is too large.

        :return: the messages that the page lacks, and the newest second in which more might be
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
            revealed = yield from self._request_page(self._since, upper, cursor)
            if revealed is None:
                continue
            if revealed.full:
                floor = max(
                    floor, revealed.oldest if until is None else min(revealed.oldest, until)
                )
            missed = [
                message
                for message in revealed.certain() or revealed.messages
                if self._is_new(message)
                and message.id not in hidden
                and page.lacks(message, shown.get(_node_of(message)))
            ]
            if missed and again is None:
                again = yield from self._request_page(self._since, until)
            if again is not None:
                # The second page has the messages that were stored after the first page was read.
                newest = {node: messages[0] for node, messages in again.by_node().items()}
                missed = [m for m in missed if again.lacks(m, newest.get(_node_of(m)))]
            if missed:
                if self._incomplete_second != second_of(missed[0]):
                    yield from self._report_hidden(missed[0], upper)
                hidden.update((message.id, message) for message in missed)
        return sorted(hidden.values(), key=_sort_key), floor

    def _report_missing(self, before: _WindowPage, shown: Iterable[StoredMessage]) -> Steps[None]:
        """Report messages that the previous page should have had, because something hid them."""
        # The newest messages might have been stored between the two requests.
        newest = max(span[1] for span in self._spans.values())
        missed = [
            second_of(message)
            for message in shown
            if self._is_new(message)
            and before.page.lacks(message, before.newest.get(_node_of(message)))
            and self._incomplete_second != second_of(message) < newest - _CLOCK_SKEW_SECONDS
        ]
        if missed:
            yield from self._report_unreadable(max(missed), before.until, HIDDEN)

    def _report_hidden(self, revealed: StoredMessage, until: int | None) -> Steps[None]:
        def is_older(second: int) -> Steps[bool]:
            page = yield from self._request_page(self._since, second)
            return page is None or page.full or bool(_messages_of(page, _node_of(revealed)))

        # The large message is in the first second from which the node is absent.
        since = second_of(revealed)
        last = since
        if until is None or since < until:
            last = (yield from self._find_last(until, is_older, since)) or since
        until = last + 1 if until is None else min(last + 1, until)
        yield from self._report_unreadable(since, until, HIDDEN)

    def _report_unreadable(self, since: int | None, until: int | None, reason: str) -> Steps[None]:
        self._remaining -= 1
        yield self._unreadable(since, until, reason)

    def _skip_large(self, until: int | None) -> Steps[int]:
        """Skip the newest message, which cannot be sent, and read the rest of its second."""

        def is_within(second: int) -> Steps[bool]:
            return (yield from self._request_page(second, until, size=1)) is None

        second = yield from self._find_last(until, is_within)
        if second is None:
            yield from self._report_unreadable(self._since, until, TOO_LARGE)
            return self._oldest - 1
        yield from self._report_unreadable(second, until, TOO_LARGE)
        self._incomplete_second = second
        if self._broker.contract is not None:
            page = yield from self._request_page(second, second, self._cursor(second))
            if page is not None and page.messages:
                yield from self._yield_new(page.certain())
                yield from self._finish_second(second, page, list(page.by_node()))
        return second - 1

    def _search_hidden(self, until: int | None) -> Steps[int | None]:
        """
        Search for messages that large ones hide, after an empty reply.

        An empty reply alone proves nothing, because one message of more than 64 KiB hides all older
        ones. A search takes some 30 small requests with doubling distances, so it can miss messages
        that were all stored within a short time long ago.
        """
        contract = self._broker.contract
        if self._slow:
            return self._oldest - 1

        def shows_any(second: int) -> Steps[bool]:
            page = yield from self._request_page(self._since, second, size=1)
            return page is None or bool(page.messages)

        second = yield from self._find_last(until, shows_any)
        if second is None:
            return self._oldest - 1
        if contract is None and self._broker.contract is not None:
            # The contract is now known, so a cursor can skip the large message.
            return until
        yield from self._report_unreadable(second + 1, until, HIDDEN)
        return second

    def _find_last(
        self, until: int | None, holds: Callable[[int], Steps[bool]], found: int | None = None
    ) -> Steps[int | None]:
        """
        Find the last second for which a condition holds, in growing steps, then by bisection.

        :param holds: the condition
        :param found: a second for which the condition holds
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

        :param page: the page that has been read of the second
        :param nodes: the nodes that have messages in the second
        :return: cursors after the last message of each node
        """
        crowded = page.full and page.oldest == second
        if crowded and self._remaining > 0:
            whole = yield from self._request_page(second, second, size=_MAX_PAGE_MESSAGES)
            if whole is not None:
                page, crowded = whole, whole.full
                nodes += [node for node in whole.by_node() if node not in nodes]
                yield from self._yield_new(whole.certain())
        for node in nodes:
            if not _is_end(page, node):
                crowded |= yield from self._finish_node(second, node, nodes)
        if crowded and self._incomplete_second != second:
            found = self._yielded_json[1] if self._yielded_json[0] == second else 0
            unexplained = self._remaining > 0 and found < _MAX_REPLY_BYTES - 4096
            if unexplained or (yield from self._may_hide_nodes()):
                self._incomplete_second = second
                yield Unreadable(second, second, CROWDED)
            else:
                self._doubtful_seconds.append(second)
        return [
            _cursor_after(yielded[-1])
            for node in nodes
            if (yielded := self._yielded.get(node)) and second_of(yielded[-1]) == second
        ]

    def _may_hide_nodes(self) -> Steps[bool]:
        """Return whether other nodes might exist than the node that fills a reply."""
        if self._probe_result is None and not self._has_several_nodes():
            self._probe_result = (yield NodeProbe()).slow
        return bool(self._probe_result) or self._has_several_nodes()

    def _finish_node(self, second: int, node: bytes, nodes: list[bytes]) -> Steps[bool]:
        """
        Read the messages of a node in a second.

        :param nodes: the nodes that are known to have messages in the second; others are added
        :return: whether messages of other nodes might have displaced messages of the node
        """
        crowded = False
        yielded = [m for m in self._yielded.get(node, ()) if second_of(m) == second]
        last = yielded[-1] if yielded else None
        anchor = yielded[0].id if len(yielded) > 1 else None
        while self._remaining > 0:
            page = None
            if last is None or self._size > 1:
                page = yield from self._request_page(second, second, anchor)
                if anchor is not None and last not in _messages_of(page, node):
                    # The last message has expired. If the anchor has too, a message was skipped.
                    page = yield from self._request_page(second, second)
            cursor = None if last is None else last.id
            fresh = self._new_of(page, node)
            if not (fresh or last is None or _is_end(page, node)):
                # A reply cannot contain two large messages.
                page = yield from self._request_page(second, second, cursor)
                if page is None:
                    cursor = _cursor_after(last)
                    page = yield from self._request_page(second, second, cursor)
                    yield from self._report_unreadable(second, second, TOO_LARGE)
                    self._incomplete_second = second
                    fresh = self._new_of(page, node)
                elif fresh := self._new_of(page, node):
                    proof = yield from self._request_page(second, second, anchor, size=1)
                    if last not in _messages_of(proof, node):
                        if len(nodes) == 1 and self._incomplete_second != second:
                            yield Unreadable(second, second, EXPIRED)
                        crowded |= len(nodes) > 1
            if page is not None:
                others = [other for other in page.by_node() if other != node]
                unknown = [other for other in others if other not in nodes]
                nodes += unknown
                crowded |= bool(unknown) or (page.full and bool(others))
            yield from self._yield_new(fresh)
            if not fresh or _is_end(page, node):
                break
            anchor = fresh[-2].id if len(fresh) > 1 else cursor
            last = fresh[-1]
        return crowded

    def _new_of(self, page: _Page | None, node: bytes) -> list[StoredMessage]:
        return [message for message in _messages_of(page, node) if self._is_new(message)]


def _messages_of(page: _Page | None, node: bytes) -> list[StoredMessage]:
    return [] if page is None else page.by_node().get(node, [])


def _is_end(page: _Page | None, node: bytes) -> bool:
    """Return whether a node has no further message that can be sent."""
    return page is not None and not page.full and _is_complete(_messages_of(page, node))


def _is_complete(messages: Sequence[StoredMessage]) -> bool:
    return _size_bytes(messages) <= _COMPLETE_NODE_BYTES


def _is_within(second: int, since: int | None, until: int | None) -> bool:
    return (since is None or since <= second) and (until is None or second <= until)


def _second_in(cursor: bytes) -> int:
    return _MAX_UINT32 - int.from_bytes(cursor[4:8], "big") + ID_EPOCH
