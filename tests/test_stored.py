"""What is asked of the nodes of a broker, so that no stored message of theirs is passed over."""

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
"""A node never gives it, nor anything before it in the same answer."""
UNSENDABLE = b"x" * 60000
"""A node gives it, but as JSON it is too large for any answer."""


def a(count: int = 0) -> Node:
    return Node(b"AAAA", count)


def b(count: int = 7000) -> Node:
    return Node(b"BBBB", count)


class Found:
    """All that a reading gives, and whether that is sound."""

    def __init__(self, nodes: Nodes, items: Iterable[StoredMessage | Unreadable]) -> None:
        everything = list(items)
        self.nodes = nodes
        self.messages = [each for each in everything if not isinstance(each, Unreadable)]
        self.unread = [each for each in everything if isinstance(each, Unreadable)]
        seconds = [second_of(message) for message in self.messages]
        assert seconds == sorted(seconds, reverse=True)
        for node in nodes.nodes:
            own = [m.id for m in self.messages if m.id[12:16] == node.name]
            assert all(newer < older for newer, older in pairwise(own)), "each once, and in order"

    def lost(self, since: int = 0, until: int = 2**32) -> list[StoredMessage]:
        """What is neither given nor reported."""
        given = {message.id for message in self.messages}
        return [
            message
            for message in self.nodes.stored
            if message.id not in given
            and since <= second_of(message) <= until
            and not any(each.since <= second_of(message) <= each.until for each in self.unread)
        ]


def found(*nodes: Node, rng: random.Random | None = None, last: int = 10**6) -> Found:
    cluster = Nodes(*nodes, rng=rng)
    return Found(cluster, read_history(cluster.answer, last))


def everything(*nodes: Node, rng: random.Random | None = None) -> int:
    """Read all, once through each node, with none missing; return the most requests that took."""
    page_requests = []
    for first in range(len(nodes)):
        result = found(*nodes[first:], *nodes[:first], rng=rng)
        assert len(result.messages) == len(result.nodes.stored)
        assert result.unread == []
        page_requests.append(len(result.nodes.page_requests))
    return max(page_requests)


# What it costs


def test_reading_a_small_channel_ends_with_a_search() -> None:
    node = a()
    for number in range(7):
        node.store(START + number, b"small")
    assert everything(node) <= 36
    assert len(found(node, last=1).nodes.page_requests) == 2


def test_a_hundred_of_many_take_two_looks() -> None:
    node = a()
    for number in range(1000):
        node.store(START + number // 50, b"small")
    assert len(found(node, last=100).nodes.page_requests) == 2
    assert everything(node) <= 40


def test_an_empty_channel_is_searched() -> None:
    assert everything(a()) <= 33


@pytest.mark.parametrize("count", [2, 3, 20])
def test_several_large_messages_in_a_row_hide_nothing(count: int) -> None:
    """Although nothing has shown before that the broker stores such messages."""
    node = a()
    for number in range(50):
        node.store(START + number, b"small")
    for number in range(count):
        node.store(START + 100 + number, bytes(70_000))
    for number in range(50):
        node.store(START + 200 + number, b"small")
    result = found(node)
    assert result.lost() == []
    assert result.unread
    assert len([each for each in result.messages if each.binary == b"small"]) == 100


# Several nodes


@pytest.mark.parametrize("rng", [None, random.Random(0)])
def test_nodes_that_take_turns(rng: random.Random | None) -> None:
    nodes = a(), b()
    for number in range(400):
        nodes[number % 2].store(START + number // 50, b"small")
    assert everything(*nodes, rng=rng) <= 40


def test_old_messages_on_one_node_and_new_ones_on_the_other() -> None:
    one, other = a(), b()
    for number in range(30):
        other.store(START + number // 2, b"old")
    for number in range(200):
        one.store(START + 100 + number // 20, b"new")
    everything(one, other)


def test_large_messages_on_one_node_beside_small_ones() -> None:
    one, other = a(), b()
    for number in range(20):
        one.store(START + number, b"x" * (45000 if number % 2 else 20000))
        other.store(START + number, b"small")
    everything(one, other)


def test_a_node_that_large_messages_cut_short_is_read_on() -> None:
    one, other = a(), b()
    for number in range(40):
        other.store(START + number, b"small")
    for number, size in enumerate((45000, 20000, 45000, 20000)):
        one.store(START + 30 + number, b"x" * size)
    everything(one, other)


def test_a_node_of_another_run_is_read_too() -> None:
    node, again = a(500), b(0)
    for number in range(200):
        node.store(START + number // 100, b"before")
    for number in range(200):
        again.store(START + 2 + number // 100, b"after")
    everything(node, again)


# More in one second than an answer can hold


@pytest.mark.parametrize("count", [1000, 2000])
def test_one_node_with_more_in_a_second_than_a_page_has(count: int) -> None:
    node = a()
    for _ in range(count):
        node.store(START, b"x" * 50)
    everything(node)


def test_one_node_with_large_messages_in_a_second() -> None:
    node = a()
    for size in (1, 40000, 1, 20000, 20000, 1, 1, 45000, 45000, 1):
        node.store(START, b"x" * size)
    everything(node)


@pytest.mark.parametrize("counts", [(0, 0), (0, 7000), (7000, 0)])
@pytest.mark.parametrize("rng", [None, random.Random(0)])
@pytest.mark.parametrize("seconds", [1, 3])
def test_two_nodes_with_more_in_a_second_than_an_answer_holds_are_reported(
    counts: tuple[int, int], rng: random.Random | None, seconds: int
) -> None:
    nodes = a(counts[0]), b(counts[1])
    for number in range(400 * seconds):
        nodes[number % 2].store(START + number // 400, b"x" * 400)
    for first in range(2):
        result = found(nodes[first], nodes[1 - first], rng=rng)
        assert result.lost() == []
        assert result.unread
        assert len(result.messages) >= 200 * seconds


def test_seconds_are_reported_late_where_nodes_are_first_seen_later() -> None:
    one, other = a(), b()
    for number in range(400):
        (one, other)[number % 2].store(START + 10, b"x" * 400)
    for number in range(20):
        (one, other)[number % 2].store(START + number // 2, b"small")
    # Through the other node, whose messages find no place beside those of the first.
    cluster = Nodes(other, one)
    cluster.may_count = False
    result = Found(cluster, read_history(cluster.answer))
    assert [each[:2] for each in result.unread] == [(START + 10, START + 10)]
    assert result.lost() == []
    assert len(result.messages) >= 220


def test_what_is_known_of_a_cluster_is_kept() -> None:
    broker = BrokerFacts()
    nodes = a(), b()
    for number in range(20):
        nodes[number % 2].store(START, b"small")
    list(read_history(Nodes(*nodes).answer, broker=broker))
    assert broker.has_several_nodes
    for number in range(400):
        nodes[number % 2].store(START + 1, b"x" * 400)
    cluster = Nodes(*nodes)
    cluster.may_count = False
    assert Found(cluster, read_history(cluster.answer, broker=broker)).lost() == []


# What cannot be read


def spans(result: Found) -> list[tuple[int, int]]:
    return [(each.since - START, each.until - START) for each in result.unread]


@pytest.mark.parametrize("others", [0, 3])
def test_one_message_that_no_answer_can_hold_is_reported_at_its_place(others: int) -> None:
    node = a()
    for second in (0, 1, 2):
        node.store(START + second, b"older")
    for second in (5, 7):
        node.store(START + second, UNSENDABLE)
    for second in range(others):
        node.store(START + 10 + second, b"newer")
    cluster = Nodes(node)
    items = list(read_history(cluster.answer))
    result = Found(cluster, items)
    newest = NOW if not others else START + 9
    assert [type(each) for each in items[others : others + 2]] == [Unreadable, Unreadable]
    assert result.unread[0][:2] == (START + 7, newest)
    assert result.unread[1][:2] == (START + 5, START + 6)
    assert len(result.messages) == 3 + others


def test_what_is_before_it_in_its_second_is_read() -> None:
    node = a()
    for binary in (b"older", b"older", UNSENDABLE, b"newer"):
        node.store(START, binary)
    node.store(START + 1, UNSENDABLE)
    node.store(START + 1, b"newest")
    node.store(START + 2, UNSENDABLE)
    result = found(node)
    assert [message.binary for message in result.messages] == [
        *(b"newest", b"newer", b"older", b"older")
    ]
    assert spans(result)[1:] == [(1, 1), (0, 0)]
    assert len(result.unread) == 3


def test_two_in_a_row_in_one_second_are_reported() -> None:
    node = a()
    for binary in (b"older", UNSENDABLE, UNSENDABLE, b"newer"):
        node.store(START, binary)
    result = found(node)
    assert result.messages[0].binary == b"newer"
    assert result.lost() == []
    assert spans(result)[0] == (0, 0)


@pytest.mark.parametrize("gap", [0, 1, 50])
def test_a_message_that_hides_those_before_it_is_passed_in_its_second_too(gap: int) -> None:
    node = a()
    for _ in range(3):
        node.store(START, b"older")
    node.store(START + gap, OVERSIZED)
    for _ in range(3):
        node.store(START + 2 * gap, b"newer")
    result = found(node)
    assert len(result.messages) == 6
    assert len(result.unread) == 1
    assert result.lost() == []


def test_a_newest_message_that_hides_all_others_is_passed() -> None:
    node = a()
    for second in range(10):
        node.store(NOW - 30 + second, b"older")
    node.store(NOW - 10, OVERSIZED)
    result = found(node)
    assert len(result.messages) == 10
    assert [each[:2] for each in result.unread] == [(NOW - 21, NOW - 10)]


def test_several_in_a_row_are_passed_once_one_is_known() -> None:
    node = a()
    for second in range(20):
        node.store(START + second, b"oldest")
    for second in (20, 21, 22):
        node.store(START + second, OVERSIZED)
    node.store(START + 30, b"older")
    node.store(START + 31, OVERSIZED)
    node.store(START + 32, b"newer")
    result = found(node)
    assert len(result.messages) == 22
    assert result.lost() == []


def test_several_in_a_row_are_passed_once_a_large_one_was_read_in_another_channel() -> None:
    broker = BrokerFacts()
    other, node = a(), a()
    other.store(START, b"x" * 45000)
    list(read_history(Nodes(other).answer, broker=broker))
    for second in range(20):
        node.store(START + second, b"oldest")
    node.store(START + 20, OVERSIZED)
    node.store(START + 21, OVERSIZED)
    node.store(START + 30, b"newest")
    cluster = Nodes(node)
    result = Found(cluster, read_history(cluster.answer, broker=broker))
    assert len(result.messages) == 21
    assert result.lost() == []


@pytest.mark.parametrize("small", [10, 150])
@pytest.mark.parametrize("counts", [(0, 7000), (7000, 0)])
def test_a_node_that_is_absent_is_looked_for(counts: tuple[int, int], small: int) -> None:
    """Its newest message is oversized, so that no page shows it while the other's go so far."""
    one, other = a(counts[0]), b(counts[1])
    for second in range(10, 20):
        other.store(START + second, b"hidden")
    other.store(START + 21, OVERSIZED)
    for number in range(small):
        one.store(START + number * 40 // small, b"small")
    for nodes in ((one, other), (other, one)):
        result = found(*nodes)
        assert len(result.messages) == small + 10
        assert spans(result) == [(19, 21)]


def test_a_node_that_shows_up_where_it_should_have_before_is_reported() -> None:
    one, other = a(), b()
    for second in range(0, 100, 2):
        one.store(START + second, b"small")
    for second in range(-10, 30):
        other.store(START + second, b"small")
    other.store(START + 40, OVERSIZED)
    other.store(START + 41, OVERSIZED)
    for number in range(200):
        one.store(START + 100 + number, b"small")
    assert found(one, other).lost() == []


# What happens meanwhile


def test_what_is_stored_meanwhile_moves_nothing() -> None:
    node = a()
    for _ in range(300):
        node.store(START, b"before")
    cluster = Nodes(node)

    def answer(request: PageRequest | NodeProbe) -> Reply:
        said = cluster.answer(request)
        for _ in range(5):
            node.store(START, b"meanwhile")
        return said

    items = list(read_history(answer))
    assert [getattr(each, "binary", None) for each in items] == [b"before"] * 300


def test_a_node_that_joins_and_one_that_leaves() -> None:
    nodes = a(), b()
    for number in range(400):
        nodes[number % 2].store(START + number // 10, b"small")
    cluster = Nodes(*nodes)
    cluster.missing.add(b"BBBB")
    given = []
    for each in read_history(cluster.answer):
        given.append(each)
        if len(given) == 20:
            cluster.missing.clear()
        if len(given) == 350:
            cluster.nodes.pop()
    assert len({each.id for each in given if isinstance(each, StoredMessage)}) >= 200


def test_a_node_that_does_not_answer_makes_what_was_read_meanwhile_incomplete() -> None:
    nodes = a(), b()
    for number in range(400):
        nodes[number % 2].store(START + number // 10, b"small")
    cluster = Nodes(*nodes)
    cluster.missing.add(b"BBBB")
    items = list(read_history(cluster.answer))
    assert len(items) == 201
    assert items[-1] == Unreadable(1514764800, NOW, items[-1].reason)  # type: ignore[union-attr]
    assert all(request.cursor is None for request in cluster.page_requests), (
        "one request at a time is slow enough"
    )
    assert len(list(read_history(cluster.answer, last=10))) == 11

    cluster.missing.clear()
    count = 0

    def answer(request: PageRequest | NodeProbe) -> Reply:
        nonlocal count
        count += 1
        said = cluster.answer(request)
        return said._replace(slow=count == 1)

    result = Found(cluster, read_history(answer))
    (unread,) = result.unread
    assert START < unread.since < unread.until == NOW
    assert len(result.messages) == 400


def test_a_cursor_that_expires_between_two_pages() -> None:
    for gone in range(1, 4):
        node = a()
        stored = [node.store(START, b"x" * 300) for _ in range(600)]
        cluster = Nodes(node)

        def answer(
            request: PageRequest | NodeProbe,
            cluster: Nodes = cluster,
            node: Node = node,
            gone: int = gone,
        ) -> Reply:
            said = cluster.answer(request)
            if (
                isinstance(request, PageRequest)
                and request.cursor
                and said.messages
                and request.since is not None
            ):
                # What has just been read, and would be the next cursor, goes.
                for message in sorted(said.messages, key=lambda m: m.id)[-gone:]:
                    node.stored.remove(message)
            return said

        items = list(read_history(answer))
        given = {each.id for each in items if isinstance(each, StoredMessage)}
        missing = [message for message in stored if message.id not in given]
        assert not missing or any(isinstance(each, Unreadable) for each in items)


# A broker that does as it likes


def page(messages: list[StoredMessage]) -> Callable[[PageRequest | NodeProbe], Reply]:
    return lambda request: Reply(messages)


def test_a_broker_that_repeats_itself_comes_to_an_end() -> None:
    node = a()
    stored = [node.store(START + number // 10, b"x") for number in range(100)]
    items = list(read_history(page(stored)))
    assert [each for each in items if isinstance(each, StoredMessage)] == stored[::-1]


def test_a_broker_that_gives_more_than_was_asked_for() -> None:
    node = a()
    stored = [node.store(START, b"x") for _ in range(500)]
    assert list(read_history(page(stored), last=3)) == stored[:-4:-1]


def test_a_broker_that_answers_nothing_comes_to_an_end() -> None:
    items = list(read_history(lambda request: Reply(None), last=5))
    assert [type(each) for each in items] == [Unreadable] * 5


def test_a_broker_that_has_nothing_where_something_was_too_large() -> None:
    count = 0

    def answer(request: PageRequest | NodeProbe) -> Reply:
        nonlocal count
        count += 1
        return Reply(None if count <= 5 else [])

    (unread,) = read_history(answer, last=1)
    assert isinstance(unread, Unreadable)
    assert unread.until == NOW


def test_a_broker_that_invents_messages_comes_to_an_end() -> None:
    rng = random.Random(1)

    def answer(request: PageRequest | NodeProbe) -> Reply:
        node = Node(rng.randbytes(4), rng.randrange(2**20))
        second = NOW if isinstance(request, NodeProbe) or request.until is None else request.until
        return Reply([node.store(second, b"x") for _ in range(rng.randrange(3))])

    assert len(list(read_history(answer, last=1000))) <= 4000


# Whatever is stored


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
def test_all_is_given_or_reported(
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
    lost = Found(result, items).lost(since or 0, until or 2**32)
    assert [message for message in lost if size_of(message) <= RESPONSE_LIMIT_BYTES] == []
    if nodes == 1 and kind != "large":
        assert all(isinstance(each, StoredMessage) for each in items)
