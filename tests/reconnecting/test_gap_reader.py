"""Reading a gap over several connections, from a model of nodes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emitter_anyio import ConnectionLostError, RequestTimeoutError, StoredMessage
from emitter_anyio._features.gap import GapReader, NewestMessages
from emitter_anyio._features.history import History, Send
from emitter_anyio._features.stored import NodeProbe, PageRequest, Reply
from emitter_anyio._features.watermark import Watermark
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout
from emitter_anyio._values.channels import KeySource
from tests.support.nodes import START, Node, Nodes, second_of

UNUSED: Any = None


class Storage(History):
    """
    The stored messages of a cluster, whose client loses its connection.

    :ivar left: the number of requests until the connection is lost
    :ivar silent: whether a missing node is silent, which delays pages, or has not joined
    :ivar timeouts: the number of requests that time out next
    """

    def __init__(self, *nodes: Node) -> None:
        super().__init__(UNUSED)
        self.nodes = Nodes(*nodes)
        self.left = 10**6
        self.silent = False
        self.timeouts = 0

    def sender(
        self, requester: Requester, key: KeySource, channel: str, timeout: Timeout = DEFAULT
    ) -> Send:
        return self._answer

    async def _answer(self, request: PageRequest | NodeProbe) -> Reply:
        if self.left == 0:
            raise ConnectionLostError("lost")
        self.left -= 1
        if self.timeouts > 0:
            self.timeouts -= 1
            raise RequestTimeoutError("no reply")
        reply = self.nodes.answer(request)
        if isinstance(request, NodeProbe) or self.silent:
            return reply
        return Reply(reply.messages)


class Gap:
    """A gap after the first message of the first node."""

    def __init__(self, *nodes: Node, limit: int = 10**6) -> None:
        watermark = Watermark()
        watermark.begin(nodes[0].store(START - 100, b"delivered"))
        self.nodes = nodes
        self.storage = Storage(*nodes)
        messages = NewestMessages(limit, 0, 0)
        self.reader = GapReader(self.storage, "a/", watermark, messages)

    def read(self, requests: int = 10**6) -> tuple[list[StoredMessage], str | None] | None:
        """Read on a new connection that lasts for some requests; ``None`` if it was too short."""
        self.storage.left = requests

        async def read() -> tuple[list[StoredMessage], str | None] | None:
            try:
                return await self.reader.read(UNUSED, "key")
            except ConnectionLostError:
                return None

        return anyio.run(read)

    def finish(self) -> tuple[list[StoredMessage], str | None]:
        """Read on a new connection that lasts."""
        result = self.read()
        assert result is not None
        return result

    def read_all(self) -> list[StoredMessage]:
        """Read on a new connection that lasts, and check that nothing might be missing."""
        found, reason = self.finish()
        assert reason is None
        return found

    @property
    def expected(self) -> set[bytes]:
        stored = (message for node in self.nodes for message in node.stored)
        return {message.id for message in stored if message.binary != b"delivered"}


def make_two_nodes() -> tuple[Gap, Node, Node]:
    one, other = Node(b"AAAA"), Node(b"BBBB", 7000)
    return Gap(one, other), one, other


def store(node: Node, first: int, last: int, size: int = 100) -> None:
    for second in range(first, last):
        node.store(START + second, bytes(size))


def in_order_of_each_node(found: list[StoredMessage]) -> bool:
    numbers: dict[bytes, list[bytes]] = {}
    for message in found:
        numbers.setdefault(message.id[12:16], []).append(message.id[4:12])
    return all(each == sorted(each, reverse=True) for each in numbers.values())


def test_reading_continues_on_the_next_connection() -> None:
    node = Node(b"AAAA")
    gap = Gap(node)
    store(node, 0, 5000)
    last = 5000
    while (result := gap.read(6)) is None:
        store(node, last, last + 1)
        last += 1
        assert last < 5020
    found, reason = result
    assert reason is None
    assert [second_of(message) - START for message in found] == list(range(last))
    assert last > 5001


def test_connection_lost_before_the_first_reply_costs_nothing() -> None:
    counts = []
    for losses in (0, 5):
        node = Node(b"AAAA")
        gap = Gap(node)
        store(node, 0, 3000)
        for _ in range(losses):
            assert gap.read(0) is None
        assert len(gap.read_all()) == 3000
        counts.append(len(gap.storage.nodes.page_requests))
    assert counts[0] == counts[1]


def test_nothing_more_is_stored_between_two_connections() -> None:
    node = Node(b"AAAA")
    gap = Gap(node)
    store(node, 0, 1000)
    assert gap.read(2) is None
    for _ in range(3):
        # A connection that finds nothing new keeps what others have read.
        assert gap.read(1) is None
    assert len(gap.read_all()) == 1000


def test_messages_of_a_node_that_was_missing_are_read() -> None:
    gap, one, other = make_two_nodes()
    store(one, 0, 3000)
    store(other, 0, 3000)
    gap.storage.nodes.missing = {b"BBBB"}
    for _ in range(3):
        assert gap.read(8) is None
    gap.storage.nodes.missing = set()
    found = gap.read_all()
    assert {message.id for message in found} == gap.expected
    assert in_order_of_each_node(found)


@pytest.mark.parametrize("seconds", [(100, 2950), range(2990)], ids=["sparse", "dense"])
def test_messages_of_a_missing_node_that_is_quiet_afterwards_are_read(
    seconds: Iterable[int],
) -> None:
    gap, one, other = make_two_nodes()
    store(one, 0, 3000)
    for second in seconds:
        other.store(START + second)
    gap.storage.nodes.missing = {b"BBBB"}
    assert gap.read(4) is None
    gap.storage.nodes.missing = set()
    assert {message.id for message in gap.read_all()} == gap.expected


def test_messages_of_a_node_that_was_missing_for_one_connection_are_read() -> None:
    gap, one, other = make_two_nodes()
    store(one, 0, 1000)
    store(other, 0, 1000)
    assert gap.read(16) is None
    gap.storage.nodes.missing = {b"BBBB"}
    store(one, 1000, 5000)
    store(other, 1000, 5000)
    assert gap.read(20) is None
    gap.storage.nodes.missing = set()
    assert {message.id for message in gap.read_all()} == gap.expected


def test_reason_is_dropped_when_all_is_read_again() -> None:
    gap, one, other = make_two_nodes()
    store(one, 0, 3000)
    store(other, 0, 3000)
    gap.storage.nodes.missing = {b"BBBB"}
    gap.storage.silent = True
    assert gap.read(6) is None
    gap.storage.nodes.missing = set()
    assert len(gap.read_all()) == 6000


@pytest.mark.parametrize("requests", range(1, 11))
def test_expiry_between_two_connections_is_reported(requests: int) -> None:
    node = Node(b"AAAA")
    gap = Gap(node)
    store(node, 0, 300)
    assert gap.read(2) is None
    store(node, 300, 310)
    assert gap.read(requests) is None
    store(node, 310, 410)
    node.stored = [message for message in node.stored if second_of(message) >= START + 400]
    _, reason = gap.finish()
    assert reason == "the last known message has expired, and later ones might have too"


def test_message_of_a_dead_node_is_not_taken_for_expired() -> None:
    gap, one, other = make_two_nodes()
    store(one, 0, 3000)
    store(other, 0, 3001)
    assert gap.read(8) is None
    assert gap.read(40) is None
    gap.storage.nodes.missing = {b"BBBB"}
    store(one, 3000, 3100)
    found = gap.read_all()
    assert len(found) > 3100


def test_timeout_does_not_prevent_reading_what_was_stored_later() -> None:
    node = Node(b"AAAA")
    gap = Gap(node)
    store(node, 0, 3000)
    assert gap.read(6) is None
    store(node, 3000, 3500)
    gap.storage.timeouts = 1
    found, reason = gap.finish()
    assert reason == "no reply"
    assert [second_of(message) - START for message in found[-600:]] == list(range(2900, 3500))


def test_messages_of_a_node_that_joined_later_are_no_reason_to_read_again() -> None:
    gap, one, other = make_two_nodes()
    store(one, 0, 5000)
    assert gap.read(10) is None
    store(one, 5000, 5010)
    store(other, 5000, 5010)
    gap.storage.nodes.page_requests.clear()
    assert {message.id for message in gap.read_all()} == gap.expected
    # The parts that were read first are not among those that are requested again.
    requested = [request.until for request in gap.storage.nodes.page_requests]
    assert not any(until is not None and START + 4500 < until < START + 4990 for until in requested)


@pytest.mark.parametrize("connections", [1, 2, 5])
def test_newest_messages_are_kept(connections: int) -> None:
    node = Node(b"AAAA")
    gap = Gap(node, limit=700)
    last = 10_000
    store(node, 0, last)
    for _ in range(1, connections):
        assert gap.read(3) is None
        store(node, last, last + 1000)
        last += 1000
    found, reason = gap.finish()
    assert [second_of(message) - START for message in found] == list(range(last - 700, last))
    assert reason == "more than resume_limit=700 messages were stored"
    assert len(gap.storage.nodes.page_requests) < 15 * connections


def test_newest_messages_of_one_second_are_kept() -> None:
    node = Node(b"AAAA")
    gap = Gap(node, limit=200)
    for _ in range(3):
        for number in range(100):
            node.store(START, str(number).encode())
        gap.read(1)
    found, _ = gap.finish()
    assert [int(message.binary) for message in found] == [*range(100), *range(100)]


def test_limited_weight_leaves_no_hole() -> None:
    node = Node(b"AAAA")
    gap = Gap(node)
    for number in range(1000):
        node.store(START, str(number).encode().ljust(40_000 if number % 2 else 0))
        if number == 900:
            assert gap.read(150) is None
    found, _ = gap.finish()
    numbers = [int(message.binary) for message in found]
    assert numbers == list(range(1000 - len(numbers), 1000))


def test_weight_is_limited_over_all_connections() -> None:
    node = Node(b"AAAA")
    gap = Gap(node)
    for number in range(20):
        store(node, 30 * number, 30 * number + 30, 40_000)
        assert gap.read(70) is None
    found, reason = gap.finish()
    assert reason == "more than 8 MiB of messages were stored"
    assert 200 < len(found) < 215
    assert [second_of(message) - START for message in found] == list(range(600 - len(found), 600))


@pytest.mark.parametrize("requests", [3, 6, 9, 12, 15, 18])
def test_reason_is_kept_for_the_next_connection(requests: int) -> None:
    node = Node(b"AAAA")
    gap = Gap(node)
    store(node, 0, 1000)
    node.store(START + 1000, bytes(60_000))
    store(node, 1003, 1050)
    assert gap.read(requests) is None
    found, reason = gap.finish()
    assert "too large" in str(reason)
    assert len(found) == 1047


@settings(max_examples=50)
@given(
    rng=st.randoms(use_true_random=False),
    nodes=st.integers(1, 3),
    steps=st.sampled_from([(0,) * 9 + (1,), (0, 1), (1, 300)]),
    requests=st.integers(1, 30),
)
def test_random_messages_are_read_once(
    rng: random.Random, nodes: int, steps: tuple[int, ...], requests: int
) -> None:
    cluster = [Node(bytes([65 + number]) * 4, 5000 * number) for number in range(nodes)]
    gap = Gap(*cluster)
    now = START

    def store_some() -> None:
        nonlocal now
        for _ in range(rng.randrange(200)):
            now += rng.choice(steps)
            # The clocks of nodes differ by up to 2 s.
            for number, node in enumerate(cluster):
                if rng.random() < 0.7:
                    node.store(now - number, bytes(rng.randrange(300)))

    store_some()
    losses = 0
    while (result := gap.read(rng.randrange(requests) if losses < 20 else 10**6)) is None:
        store_some()
        losses += 1
    found, reason = result
    assert reason is None
    identities = [message.id for message in found]
    assert len(identities) == len(set(identities))
    assert set(identities) == gap.expected
    assert in_order_of_each_node(found)
    assert [second_of(message) for message in found] == sorted(map(second_of, found))
