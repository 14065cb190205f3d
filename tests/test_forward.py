"""Reading stored messages forward: nothing is missed, and memory is bounded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emitter_anyio import StoredMessage
from emitter_anyio._features import forward
from emitter_anyio._features.forward import EXPIRED_SINCE, LOOK_BACK_REQUESTS, ForwardReading
from emitter_anyio._features.position import OVERLAP_SECONDS, Position
from emitter_anyio._features.stored import (
    BrokerFacts,
    NodeProbe,
    PageRequest,
    Reply,
    Steps,
    Unreadable,
    advance,
)
from tests.support.nodes import (
    NOW,
    RESPONSE_LIMIT_BYTES,
    START,
    Node,
    Nodes,
    second_of,
    size_of,
)

DAY = 86400
Items = list[StoredMessage | Unreadable]


def make_node(name: bytes = b"AAAA", count: int = 0) -> Node:
    return Node(name, count)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make windows of a few messages, and hold few more."""
    monkeypatch.setattr(forward, "_MAX_WINDOW_BYTES", 4000)
    monkeypatch.setattr(forward, "_MAX_HELD_BYTES", 8000)


def run(
    steps: Steps[None], answer: Callable[[PageRequest | NodeProbe], Reply]
) -> Iterator[StoredMessage | Unreadable]:
    step = advance(steps)
    while step is not None:
        if isinstance(step, PageRequest | NodeProbe):
            step = advance(steps, answer(step))
        else:
            # As Reader does: the sequence continues before the caller has the item.
            item, step = step, advance(steps)
            yield item


def reading(position: Position, until: int | None = None, now: int = NOW) -> ForwardReading:
    return ForwardReading(position, until, now, BrokerFacts(), "a")


def read(
    nodes: Nodes,
    position: Position,
    *,
    last: int | None = None,
    expect_last: bool = False,
    look_back: int = 0,
) -> Items:
    """Read everything after a position, which moves to the end."""
    count = 2**31 - 1 if last is None else last
    steps = reading(position).read(count, expect_last=expect_last, look_back=look_back)
    return list(run(steps, nodes.answer))


def in_order(*nodes: Node) -> list[bytes]:
    stored = [message for node in nodes for message in node.stored]
    return [m.id for m in sorted(stored, key=lambda m: m.id[4:16], reverse=True)]


def ids(items: Items) -> list[bytes]:
    return [item.id for item in items if isinstance(item, StoredMessage)]


# One node


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("spacing", [0.001, 0.1, 1, 1000, DAY / 2])
def test_everything_is_read_once_in_order(spacing: float) -> None:
    node = make_node()
    for number in range(500):
        node.store(START + int(number * spacing), b"x" * (number % 50))
    nodes, position = Nodes(node), Position()
    assert ids(read(nodes, position)) == in_order(node)
    assert read(nodes, position) == []


@pytest.mark.usefixtures("small_windows")
def test_bursts_between_long_silences_are_read() -> None:
    node = make_node()
    for burst in range(10):
        for number in range(100):
            node.store(START + burst * 30 * DAY + number // 40, b"x" * 50)
    nodes = Nodes(node)
    assert ids(read(nodes, Position())) == in_order(node)
    assert len(nodes.page_requests) < 1500


def test_a_small_channel_is_read_as_cheaply_as_newest_first() -> None:
    node = make_node()
    for number in range(7):
        node.store(START + number, b"small")
    nodes, position = Nodes(node), Position()
    assert len(read(nodes, position)) == 7
    assert len(nodes.page_requests) <= 36
    nodes.page_requests.clear()
    node.store(START + 60, b"new")
    assert len(read(nodes, position)) == 1
    assert len(nodes.page_requests) <= 8


def test_the_first_message_of_a_large_channel_comes_soon() -> None:
    node = make_node()
    for number in range(20_000):
        node.store(START + number, b"x" * 100)
    nodes = Nodes(node)
    first = next(run(reading(Position()).read(), nodes.answer))
    assert isinstance(first, StoredMessage)
    assert second_of(first) == START
    assert len(nodes.page_requests) < 130


@pytest.mark.usefixtures("small_windows")
def test_a_second_with_more_than_may_be_held_is_read_in_several_passes() -> None:
    node = make_node()
    for number in range(300):
        node.store(START + 2 * (number // 200), b"x" * 20)
    assert ids(read(Nodes(node), Position())) == in_order(node)


@pytest.mark.parametrize("last", [0, 1, 7, 50])
@pytest.mark.usefixtures("small_windows")
def test_last_counts_from_the_oldest(last: int) -> None:
    node = make_node()
    for number in range(50):
        node.store(START + number)
    nodes = Nodes(node)
    assert ids(read(nodes, Position(), last=last)) == in_order(node)[:last]
    assert bool(nodes.page_requests) == (last > 0)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("until", [-1, 0, 10, 49, 100])
def test_it_ends_at_until(until: int) -> None:
    node = make_node()
    for number in range(50):
        node.store(START + number)
    steps = reading(Position(), START + until).read()
    assert ids(list(run(steps, Nodes(node).answer))) == in_order(node)[: until + 1]


@pytest.mark.parametrize("last", [1, 13, 14, 60, 200, 2**31 - 1])
@pytest.mark.parametrize("per_second", [1, 20, 1000])
@pytest.mark.usefixtures("small_windows")
def test_the_newest_are_read_oldest_first(last: int, per_second: int) -> None:
    node = make_node()
    for number in range(200):
        node.store(START + number // per_second)
    nodes = Nodes(node)
    stored = in_order(node)

    def answer(request: PageRequest | NodeProbe) -> Reply:
        # Messages that are stored during the reading are not among the newest.
        reply = nodes.answer(request)
        node.store(NOW)
        return reply

    found = ids(list(run(reading(Position()).read_newest(last), answer)))
    assert [id for id in found if id in stored] == stored[-last:]
    assert len(found) <= last


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_MAX_WINDOW_BYTES", 4000)
    monkeypatch.setattr(forward, "_MAX_HELD_BYTES", 8000)
    held = []
    add = forward._Window.add

    def note(window: forward._Window, item: StoredMessage | Unreadable) -> None:
        add(window, item)
        held.append(len(window.items))

    monkeypatch.setattr(forward._Window, "add", note)
    node = make_node()
    for number in range(400):
        node.store(START + number // 100 * 50)
    for steps in reading(Position()).read(), reading(Position()).read_newest(350):
        list(run(steps, Nodes(node).answer))
    assert max(held) <= 8000 // 256 + 1


# Continuing at a position


def test_a_message_that_is_stored_late_is_read() -> None:
    node = make_node()
    early = [node.store(START + 10 - second) for second in range(OVERLAP_SECONDS)]
    node.stored.clear()
    node.store(START + 10)
    position = Position()
    nodes = Nodes(node)
    read(nodes, position)
    for message in early[1:]:
        node.stored.append(message)
    node.stored.sort(key=lambda message: message.id)
    position = Position.parse(position.cursor)
    assert ids(read(nodes, position)) == [message.id for message in early[:0:-1]]
    assert read(nodes, position) == []


def test_an_expired_last_message_is_reported_once_before_the_others() -> None:
    node = make_node()
    for number in range(100):
        node.store(START + number)
    nodes, position = Nodes(node), Position()
    read(nodes, position, last=50)
    assert len(read(nodes, Position.parse(position.cursor), expect_last=True)) == 50
    del node.stored[30:]
    first, *others = read(nodes, Position.parse(position.cursor), expect_last=True)
    assert first == Unreadable(START + 49, START + 70, EXPIRED_SINCE)
    assert ids(others) == in_order(node)
    node.stored.clear()
    (only,) = read(nodes, Position.parse(position.cursor), expect_last=True)
    assert only == Unreadable(START + 49, NOW, EXPIRED_SINCE)
    assert read(nodes, Position(), expect_last=True) == []


# Nodes whose clocks are behind


@pytest.mark.parametrize("lag", [30, 600])
def test_looking_back_finds_the_messages_of_a_node_that_is_behind(lag: int) -> None:
    ahead, behind = make_node(b"AAAA"), make_node(b"BBBB")
    nodes, position = Nodes(ahead, behind), Position()
    behind.store(START - lag)
    ahead.store(START)
    found = ids(read(nodes, position, look_back=LOOK_BACK_REQUESTS))
    for second in range(1, 2 * lag):
        ahead.store(START + second)
        if second % 2:
            behind.store(START + second - lag)
        if second % (lag // 3) == 0:
            found += ids(read(nodes, position))
            position = Position.parse(position.cursor)
            found += ids(read(nodes, position, look_back=LOOK_BACK_REQUESTS))
    found += ids(read(nodes, position, look_back=LOOK_BACK_REQUESTS))
    assert len(found) == len(set(found))
    assert set(found) == set(in_order(ahead, behind))


def test_looking_back_finds_the_messages_of_an_unknown_node_that_is_behind() -> None:
    ahead, behind = make_node(b"AAAA"), make_node(b"BBBB")
    nodes, position = Nodes(ahead, behind), Position()
    for second in range(200):
        ahead.store(START + second)
    read(nodes, position)
    late = [behind.store(START + second).id for second in range(50, 150)]
    assert ids(read(nodes, position, look_back=LOOK_BACK_REQUESTS)) == late


def test_looking_back_continues_before_a_reply_that_cannot_be_sent() -> None:
    ahead, behind = make_node(b"AAAA"), make_node(b"BBBB")
    nodes, position = Nodes(ahead, behind), Position()
    behind.store(START)
    for second in range(100):
        ahead.store(START + second, b"x" * 3000 if second > 50 else b"")
    read(nodes, position)
    late = behind.store(START + 2)
    assert ids(read(nodes, position, look_back=LOOK_BACK_REQUESTS)) == [late.id]


def test_looking_back_for_a_message_that_cannot_be_read_is_done_once() -> None:
    ahead, position = make_node(b"AAAA"), Position()
    for second in range(100):
        ahead.store(START + second)
    nodes = Nodes(ahead)
    read(nodes, position)
    hidden = make_node(b"BBBB").store(START + 50)

    def answer(request: PageRequest | NodeProbe) -> Reply:
        reply = nodes.answer(request)
        looks_back = isinstance(request, PageRequest) and request.last == 64
        return Reply([*(reply.messages or ()), hidden]) if looks_back else reply

    oldest = []
    for _ in range(2):
        nodes.page_requests.clear()
        assert list(run(reading(position).read(look_back=LOOK_BACK_REQUESTS), answer)) == []
        requests = nodes.page_requests
        oldest.append(min(each.since or 0 for each in requests if each.last != 64))
    assert oldest[0] < START < oldest[1]


def test_looking_back_in_an_empty_channel_requests_nothing() -> None:
    nodes = Nodes(make_node())
    counts = []
    for look_back in (0, LOOK_BACK_REQUESTS):
        nodes.page_requests.clear()
        assert read(nodes, Position(), look_back=look_back) == []
        counts.append(len(nodes.page_requests))
    assert counts[0] == counts[1]


# Messages that cannot be read


@pytest.mark.usefixtures("small_windows")
def test_unreadable_messages_are_reported_in_their_place() -> None:
    node = make_node()
    for number in range(60):
        node.store(
            START + number, b"x" * (60_000 if number == 30 else 70_000 if number == 40 else 9)
        )
    items = read(Nodes(node), Position())
    readable = [message.id for message in node.stored[::-1] if size_of(message) < 60_000]
    assert ids(items) == readable
    unread = [item for item in items if isinstance(item, Unreadable)]
    for second in 30, 40:
        assert any(each.since <= START + second <= each.until for each in unread)
    seconds = [i.since if isinstance(i, Unreadable) else second_of(i) for i in items]
    assert all(later >= earlier - 1 for earlier, later in pairwise(seconds))


@pytest.mark.usefixtures("small_windows")
def test_an_oversized_message_does_not_hide_the_oldest_messages() -> None:
    node = make_node()
    node.store(START, b"oldest")
    node.store(START + 30 * DAY, b"x" * 70_000)
    for number in range(50):
        node.store(START + 60 * DAY + number, b"newer")
    assert len(ids(read(Nodes(node), Position()))) == 51


def test_a_broker_that_sends_nothing_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_MAX_WINDOW_BYTES", 4000)
    monkeypatch.setattr(forward, "_MAX_HELD_BYTES", 8000)
    steps = reading(Position(START)).read()
    items = run(steps, lambda request: Reply(None))
    found = [next(items) for _ in range(100)]
    assert all(isinstance(each, Unreadable) for each in found)


def test_the_bisection_ends_whatever_the_broker_replies() -> None:
    rng = random.Random(3)
    for _ in range(50):
        steps = reading(Position())._find_oldest(None, START)
        next(steps)
        with pytest.raises(StopIteration) as stopped:
            while True:
                node = make_node()
                node.store(rng.choice([START - 10**8, START, NOW]))
                steps.send(Reply(rng.choice([None, [], node.stored])))
        assert stopped.value.value <= START


# Several nodes, and arbitrary contents


sizes = {"small": [0, 10, 100, 400], "mixed": [0, 10, 400, 20000, 45000], "large": [10, 50000]}


@settings(max_examples=40)
@given(
    rng=st.randoms(use_true_random=False),
    kind=st.sampled_from(sorted(sizes)),
    nodes=st.integers(1, 3),
    span=st.sampled_from([1, 3, 10, 100, 5000, 10**7]),
    count=st.sampled_from([0, 1, 5, 20, 60]),
    newest=st.booleans(),
)
def test_everything_is_read_or_reported_across_restarts(
    rng: random.Random, kind: str, nodes: int, span: int, count: int, newest: bool
) -> None:
    cluster = [
        Node(bytes([65 + number]) * 4, rng.choice([0, 1000, 100000])) for number in range(nodes)
    ]
    seconds = sorted(rng.randrange(span) for _ in range(count))
    later = [second for second in seconds if second > span // 2]
    found: list[bytes] = []
    unread: list[Unreadable] = []

    def store(seconds: list[int]) -> None:
        for second in seconds:
            rng.choice(cluster).store(START + second, b"x" * rng.choice(sizes[kind]))

    store(seconds[: len(seconds) - len(later)])
    answer = Nodes(*cluster, rng=random.Random(0)).answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "_MAX_WINDOW_BYTES", 5000)
        patch.setattr(forward, "_MAX_HELD_BYTES", 100_000)
        cursor = Position().cursor
        while True:
            position = Position.parse(cursor)
            before = len(found)
            for item in run(reading(position, now=START + span).read(), answer):
                if isinstance(item, Unreadable):
                    unread.append(item)
                    continue
                found.append(item.id)
                cursor = position.cursor
                if rng.random() < 0.05:
                    break
            else:
                cursor = position.cursor
                if len(found) == before and not later:
                    break
                store(later)
                later = []
    assert len(found) == len(set(found))
    # Within a window that is reported, messages can be missing or late.
    certain = {
        message.id
        for node in cluster
        for message in node.stored
        if size_of(message) <= RESPONSE_LIMIT_BYTES
        and not any(each.since <= second_of(message) <= each.until for each in unread)
    }
    assert certain <= set(found)
    for node in cluster:
        own = [id for id in found if id[12:16] == node.name and id in certain]
        assert own == sorted(own, reverse=True)
    if newest:
        last = max(1, count // 2)
        items = list(run(reading(Position()).read_newest(last), answer))
        assert len(ids(items)) <= last
