"""Reading history from a cluster: every stored message is returned or reported as unreadable."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emitter_anyio import StoredMessage
from emitter_anyio._features.stored import BrokerFacts, NodeProbe, PageRequest, Reply, Unreadable
from tests.support.nodes import (
    NOW,
    RESPONSE_LIMIT_BYTES,
    START,
    Node,
    Nodes,
    read_history,
    second_of,
    size_of,
)

OVERSIZED = b"x" * 65536
"""A node returns neither this message nor any older one in the same answer."""
UNSENDABLE = b"x" * 60000
"""A node returns this message, but as JSON it is too large for any answer."""


def node_a(count: int = 0) -> Node:
    return Node(b"AAAA", count)


def node_b(count: int = 7000) -> Node:
    return Node(b"BBBB", count)


class ReadResult:
    """The result of reading history; checks order and uniqueness."""

    def __init__(self, nodes: Nodes, items: Iterable[StoredMessage | Unreadable]) -> None:
        all_items = list(items)
        self.nodes = nodes
        self.messages = [each for each in all_items if not isinstance(each, Unreadable)]
        self.unread = [each for each in all_items if isinstance(each, Unreadable)]
        seconds = [second_of(message) for message in self.messages]
        assert seconds == sorted(seconds, reverse=True)
        for node in nodes.nodes:
            own = [m.id for m in self.messages if m.id[12:16] == node.name]
            assert all(newer < older for newer, older in pairwise(own)), (
                "a message is repeated or out of order"
            )

    def unreported(self, since: int = 0, until: int = 2**32) -> list[StoredMessage]:
        """Return the stored messages that were neither returned nor reported."""
        returned = {message.id for message in self.messages}
        return [
            message
            for message in self.nodes.stored
            if message.id not in returned
            and since <= second_of(message) <= until
            and not any(each.since <= second_of(message) <= each.until for each in self.unread)
        ]


def read_all(*nodes: Node, rng: random.Random | None = None, last: int = 10**6) -> ReadResult:
    cluster = Nodes(*nodes, rng=rng)
    return ReadResult(cluster, read_history(cluster.answer, last))


def read_from_each_node(*nodes: Node, rng: random.Random | None = None) -> int:
    """Read through each node in turn, check that none is missing, and return the most requests."""
    page_requests = []
    for first in range(len(nodes)):
        result = read_all(*nodes[first:], *nodes[:first], rng=rng)
        assert len(result.messages) == len(result.nodes.stored)
        assert result.unread == []
        page_requests.append(len(result.nodes.page_requests))
    return max(page_requests)


# Number of requests


def test_small_channel_takes_few_requests() -> None:
    node = node_a()
    for number in range(7):
        node.store(START + number, b"small")
    assert read_from_each_node(node) <= 36
    assert len(read_all(node, last=1).nodes.page_requests) == 2


def test_newest_100_take_two_requests() -> None:
    node = node_a()
    for number in range(1000):
        node.store(START + number // 50, b"small")
    assert len(read_all(node, last=100).nodes.page_requests) == 2
    assert read_from_each_node(node) <= 40


def test_empty_channel_takes_few_requests() -> None:
    assert read_from_each_node(node_a()) <= 33


@pytest.mark.parametrize("count", [2, 3, 20])
def test_consecutive_oversized_messages_hide_nothing(count: int) -> None:
    """The reader has no earlier sign that the broker stores such messages."""
    node = node_a()
    for number in range(50):
        node.store(START + number, b"small")
    for number in range(count):
        node.store(START + 100 + number, bytes(70_000))
    for number in range(50):
        node.store(START + 200 + number, b"small")
    result = read_all(node)
    assert result.unreported() == []
    assert result.unread
    assert len([each for each in result.messages if each.binary == b"small"]) == 100


# Several nodes


@pytest.mark.parametrize("rng", [None, random.Random(0)])
def test_nodes_with_alternating_messages(rng: random.Random | None) -> None:
    nodes = node_a(), node_b()
    for number in range(400):
        nodes[number % 2].store(START + number // 50, b"small")
    assert read_from_each_node(*nodes, rng=rng) <= 40


def test_old_messages_on_one_node_and_new_ones_on_the_other() -> None:
    one, other = node_a(), node_b()
    for number in range(30):
        other.store(START + number // 2, b"old")
    for number in range(200):
        one.store(START + 100 + number // 20, b"new")
    read_from_each_node(one, other)


def test_large_messages_on_one_node_and_small_ones_on_the_other() -> None:
    one, other = node_a(), node_b()
    for number in range(20):
        one.store(START + number, b"x" * (45000 if number % 2 else 20000))
        other.store(START + number, b"small")
    read_from_each_node(one, other)


def test_node_whose_page_is_cut_by_large_messages_is_read_further() -> None:
    one, other = node_a(), node_b()
    for number in range(40):
        other.store(START + number, b"small")
    for number, size in enumerate((45000, 20000, 45000, 20000)):
        one.store(START + 30 + number, b"x" * size)
    read_from_each_node(one, other)


def test_restarted_node_is_read() -> None:
    node, restarted = node_a(500), node_b(0)
    for number in range(200):
        node.store(START + number // 100, b"before")
    for number in range(200):
        restarted.store(START + 2 + number // 100, b"after")
    read_from_each_node(node, restarted)


# More in one second than an answer can hold


@pytest.mark.parametrize("count", [1000, 2000])
def test_one_second_with_more_messages_than_a_page(count: int) -> None:
    node = node_a()
    for _ in range(count):
        node.store(START, b"x" * 50)
    read_from_each_node(node)


def test_one_second_with_large_messages() -> None:
    node = node_a()
    for size in (1, 40000, 1, 20000, 20000, 1, 1, 45000, 45000, 1):
        node.store(START, b"x" * size)
    read_from_each_node(node)


@pytest.mark.parametrize("counts", [(0, 0), (0, 7000), (7000, 0)])
@pytest.mark.parametrize("rng", [None, random.Random(0)])
@pytest.mark.parametrize("seconds", [1, 3])
def test_seconds_too_full_on_two_nodes_are_reported(
    counts: tuple[int, int], rng: random.Random | None, seconds: int
) -> None:
    nodes = node_a(counts[0]), node_b(counts[1])
    for number in range(400 * seconds):
        nodes[number % 2].store(START + number // 400, b"x" * 400)
    for first in range(2):
        result = read_all(nodes[first], nodes[1 - first], rng=rng)
        assert result.unreported() == []
        assert result.unread
        assert len(result.messages) >= 200 * seconds


def test_full_second_is_reported_when_a_second_node_is_found_later() -> None:
    one, other = node_a(), node_b()
    for number in range(400):
        (one, other)[number % 2].store(START + 10, b"x" * 400)
    for number in range(20):
        (one, other)[number % 2].store(START + number // 2, b"small")
    # Read through the second node, whose messages have no space beside those of the first.
    cluster = Nodes(other, one)
    cluster.may_count = False
    result = ReadResult(cluster, read_history(cluster.answer))
    assert [each[:2] for each in result.unread] == [(START + 10, START + 10)]
    assert result.unreported() == []
    assert len(result.messages) >= 220


def test_facts_about_a_cluster_are_remembered() -> None:
    broker = BrokerFacts()
    nodes = node_a(), node_b()
    for number in range(20):
        nodes[number % 2].store(START, b"small")
    list(read_history(Nodes(*nodes).answer, broker=broker))
    assert broker.has_several_nodes
    for number in range(400):
        nodes[number % 2].store(START + 1, b"x" * 400)
    cluster = Nodes(*nodes)
    cluster.may_count = False
    assert ReadResult(cluster, read_history(cluster.answer, broker=broker)).unreported() == []


# Unreadable messages


def spans(result: ReadResult) -> list[tuple[int, int]]:
    return [(each.since - START, each.until - START) for each in result.unread]


@pytest.mark.parametrize("newer_count", [0, 3])
def test_message_too_large_to_send_is_reported_in_its_place(newer_count: int) -> None:
    node = node_a()
    for second in (0, 1, 2):
        node.store(START + second, b"older")
    for second in (5, 7):
        node.store(START + second, UNSENDABLE)
    for second in range(newer_count):
        node.store(START + 10 + second, b"newer")
    cluster = Nodes(node)
    items = list(read_history(cluster.answer))
    result = ReadResult(cluster, items)
    newest = NOW if not newer_count else START + 9
    assert [type(each) for each in items[newer_count : newer_count + 2]] == [Unreadable, Unreadable]
    assert result.unread[0][:2] == (START + 7, newest)
    assert result.unread[1][:2] == (START + 5, START + 6)
    assert len(result.messages) == 3 + newer_count


def test_older_messages_in_the_second_of_an_unsendable_one_are_read() -> None:
    node = node_a()
    for binary in (b"older", b"older", UNSENDABLE, b"newer"):
        node.store(START, binary)
    node.store(START + 1, UNSENDABLE)
    node.store(START + 1, b"newest")
    node.store(START + 2, UNSENDABLE)
    result = read_all(node)
    assert [message.binary for message in result.messages] == [
        *(b"newest", b"newer", b"older", b"older")
    ]
    assert spans(result)[1:] == [(1, 1), (0, 0)]
    assert len(result.unread) == 3


def test_older_messages_are_read_if_the_newest_of_their_second_is_unsendable() -> None:
    node = node_a()
    for binary in (b"older", b"older", UNSENDABLE):
        node.store(START, binary)
    node.store(START + 10, b"newer")
    result = read_all(node)
    assert [message.binary for message in result.messages] == [b"newer", b"older", b"older"]
    assert spans(result) == [(0, 9)]


def test_two_unsendable_messages_in_one_second_are_reported() -> None:
    node = node_a()
    for binary in (b"older", UNSENDABLE, UNSENDABLE, b"newer"):
        node.store(START, binary)
    result = read_all(node)
    assert result.messages[0].binary == b"newer"
    assert result.unreported() == []
    assert spans(result)[0] == (0, 0)


@pytest.mark.parametrize("gap", [0, 1, 50])
def test_oversized_message_is_skipped(gap: int) -> None:
    node = node_a()
    for _ in range(3):
        node.store(START, b"older")
    node.store(START + gap, OVERSIZED)
    for _ in range(3):
        node.store(START + 2 * gap, b"newer")
    result = read_all(node)
    assert len(result.messages) == 6
    assert len(result.unread) == 1
    assert result.unreported() == []


def test_oversized_newest_message_is_skipped() -> None:
    node = node_a()
    for second in range(10):
        node.store(NOW - 30 + second, b"older")
    node.store(NOW - 10, OVERSIZED)
    result = read_all(node)
    assert len(result.messages) == 10
    assert [each[:2] for each in result.unread] == [(NOW - 21, NOW - 10)]


def test_consecutive_oversized_messages_are_skipped_after_one_was_found() -> None:
    node = node_a()
    for second in range(20):
        node.store(START + second, b"oldest")
    for second in (20, 21, 22):
        node.store(START + second, OVERSIZED)
    node.store(START + 30, b"older")
    node.store(START + 31, OVERSIZED)
    node.store(START + 32, b"newer")
    result = read_all(node)
    assert len(result.messages) == 22
    assert result.unreported() == []


def test_consecutive_oversized_messages_are_skipped_after_a_large_one_in_another_channel() -> None:
    broker = BrokerFacts()
    other, node = node_a(), node_a()
    other.store(START, b"x" * 45000)
    list(read_history(Nodes(other).answer, broker=broker))
    for second in range(20):
        node.store(START + second, b"oldest")
    node.store(START + 20, OVERSIZED)
    node.store(START + 21, OVERSIZED)
    node.store(START + 30, b"newest")
    cluster = Nodes(node)
    result = ReadResult(cluster, read_history(cluster.answer, broker=broker))
    assert len(result.messages) == 21
    assert result.unreported() == []


@pytest.mark.parametrize("small", [10, 150])
@pytest.mark.parametrize("counts", [(0, 7000), (7000, 0)])
def test_node_missing_from_pages_is_searched_for(counts: tuple[int, int], small: int) -> None:
    """The node's newest message is oversized, so pages show only the other node's messages."""
    one, other = node_a(counts[0]), node_b(counts[1])
    for second in range(10, 20):
        other.store(START + second, b"hidden")
    other.store(START + 21, OVERSIZED)
    for number in range(small):
        one.store(START + number * 40 // small, b"small")
    for nodes in ((one, other), (other, one)):
        result = read_all(*nodes)
        assert len(result.messages) == small + 10
        assert spans(result) == [(19, 21)]


def test_node_that_appears_too_late_is_reported() -> None:
    one, other = node_a(), node_b()
    for second in range(0, 100, 2):
        one.store(START + second, b"small")
    for second in range(-10, 30):
        other.store(START + second, b"small")
    other.store(START + 40, OVERSIZED)
    other.store(START + 41, OVERSIZED)
    for number in range(200):
        one.store(START + 100 + number, b"small")
    assert read_all(one, other).unreported() == []


# Changes during reading


def test_messages_stored_while_reading_do_not_shift_pages() -> None:
    node = node_a()
    for _ in range(300):
        node.store(START, b"before")
    cluster = Nodes(node)

    def answer(request: PageRequest | NodeProbe) -> Reply:
        reply = cluster.answer(request)
        for _ in range(5):
            node.store(START, b"during")
        return reply

    items = list(read_history(answer))
    assert [getattr(each, "binary", None) for each in items] == [b"before"] * 300


def test_nodes_that_join_and_leave_while_reading() -> None:
    nodes = node_a(), node_b()
    for number in range(400):
        nodes[number % 2].store(START + number // 10, b"small")
    cluster = Nodes(*nodes)
    cluster.missing.add(b"BBBB")
    results = []
    for each in read_history(cluster.answer):
        results.append(each)
        if len(results) == 20:
            cluster.missing.clear()
        if len(results) == 350:
            cluster.nodes.pop()
    assert len({each.id for each in results if isinstance(each, StoredMessage)}) >= 200


def test_unanswering_node_makes_the_result_incomplete() -> None:
    nodes = node_a(), node_b()
    for number in range(400):
        nodes[number % 2].store(START + number // 10, b"small")
    cluster = Nodes(*nodes)
    cluster.missing.add(b"BBBB")
    items = list(read_history(cluster.answer))
    assert len(items) == 201
    assert items[-1] == Unreadable(1514764800, NOW, items[-1].reason)  # type: ignore[union-attr]
    assert all(request.cursor is None for request in cluster.page_requests), (
        "a slow cluster is read with one request at a time"
    )
    assert len(list(read_history(cluster.answer, last=10))) == 11

    cluster.missing.clear()
    count = 0

    def answer(request: PageRequest | NodeProbe) -> Reply:
        nonlocal count
        count += 1
        reply = cluster.answer(request)
        return reply._replace(slow=count == 1)

    result = ReadResult(cluster, read_history(answer))
    (unread,) = result.unread
    assert START < unread.since < unread.until == NOW
    assert len(result.messages) == 400


def test_cursor_that_expires_between_two_pages() -> None:
    for expired_count in range(1, 4):
        node = node_a()
        stored = [node.store(START, b"x" * 300) for _ in range(600)]
        cluster = Nodes(node)

        def answer(
            request: PageRequest | NodeProbe,
            cluster: Nodes = cluster,
            node: Node = node,
            expired_count: int = expired_count,
        ) -> Reply:
            reply = cluster.answer(request)
            if (
                isinstance(request, PageRequest)
                and request.cursor
                and reply.messages
                and request.since is not None
            ):
                # Remove the messages just read, one of which would be the next cursor.
                for message in sorted(reply.messages, key=lambda m: m.id)[-expired_count:]:
                    node.stored.remove(message)
            return reply

        items = list(read_history(answer))
        results = {each.id for each in items if isinstance(each, StoredMessage)}
        missing = [message for message in stored if message.id not in results]
        assert not missing or any(isinstance(each, Unreadable) for each in items)


# Misbehaving brokers


def page(messages: list[StoredMessage]) -> Callable[[PageRequest | NodeProbe], Reply]:
    return lambda request: Reply(messages)


def test_reading_a_broker_that_repeats_itself_ends() -> None:
    node = node_a()
    stored = [node.store(START + number // 10, b"x") for number in range(100)]
    items = list(read_history(page(stored)))
    assert [each for each in items if isinstance(each, StoredMessage)] == stored[::-1]


def test_more_messages_than_requested_are_cut() -> None:
    node = node_a()
    stored = [node.store(START, b"x") for _ in range(500)]
    assert list(read_history(page(stored), last=3)) == stored[:-4:-1]


def test_reading_a_broker_that_never_answers_ends() -> None:
    items = list(read_history(lambda request: Reply(None), last=5))
    assert [type(each) for each in items] == [Unreadable] * 5


def test_empty_page_after_pages_too_large_is_reported() -> None:
    count = 0

    def answer(request: PageRequest | NodeProbe) -> Reply:
        nonlocal count
        count += 1
        return Reply(None if count <= 5 else [])

    (unread,) = read_history(answer, last=1)
    assert isinstance(unread, Unreadable)
    assert unread.until == NOW


def test_reading_a_broker_that_invents_messages_ends() -> None:
    rng = random.Random(1)

    def answer(request: PageRequest | NodeProbe) -> Reply:
        node = Node(rng.randbytes(4), rng.randrange(2**20))
        second = NOW if isinstance(request, NodeProbe) or request.until is None else request.until
        return Reply([node.store(second, b"x") for _ in range(rng.randrange(3))])

    assert len(list(read_history(answer, last=1000))) <= 4000


# Random contents


sizes = {
    "small": [0, 10, 100, 400],
    "mixed": [0, 10, 100, 400, 400, 20000, 45000],
    "large": [10, 100, 20000, 45000, 50000, 60000],
}


@settings(max_examples=60)
@given(
    rng=st.randoms(use_true_random=False),
    kind=st.sampled_from(sorted(sizes)),
    nodes=st.integers(1, 3),
    span=st.sampled_from([1, 3, 10, 100, 5000]),
    count=st.sampled_from([0, 1, 5, 30, 200]),
    mixed=st.booleans(),
)
def test_every_message_is_returned_or_reported(
    rng: random.Random, kind: str, nodes: int, span: int, count: int, mixed: bool
) -> None:
    cluster = [
        Node(bytes([65 + number]) * 4, rng.choice([0, 1000, 100000])) for number in range(nodes)
    ]
    for second in sorted(rng.randrange(span) for _ in range(count)):
        rng.choice(cluster).store(START + second, b"x" * rng.choice(sizes[kind]))
    since = START + rng.randrange(span) if rng.random() < 0.3 else None
    until = START + rng.randrange(span) if rng.random() < 0.3 else None
    result = Nodes(*cluster, rng=random.Random(0) if mixed else None)
    now = START + span + rng.choice([-1, 0, 1, 100])
    items = list(read_history(result.answer, since=since, until=until, now=now))
    unreported = ReadResult(result, items).unreported(since or 0, until or 2**32)
    assert [message for message in unreported if size_of(message) <= RESPONSE_LIMIT_BYTES] == []
    if nodes == 1 and kind != "large":
        assert all(isinstance(each, StoredMessage) for each in items)
