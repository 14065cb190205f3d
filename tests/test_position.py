"""Positions among stored messages, and their cursors."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio import StoredMessage
from emitter_anyio._features.position import (
    OVERLAP_SECONDS,
    RETENTION_SECONDS,
    NodeMessage,
    Position,
    identify,
)
from emitter_anyio._features.stored import ID_EPOCH
from tests.support.nodes import START, Node, second_of

A, B = b"AAAA", b"BBBB"


def stored(seconds: Sequence[int], node: bytes = A) -> list[StoredMessage]:
    """Store a message in each second after the start."""
    storing = Node(node)
    return [storing.store(START + second) for second in seconds]


def read(position: Position, messages: Sequence[StoredMessage], newest: int | None = None) -> None:
    """Read messages; ``newest`` is the second of the newest known message."""
    last = max(map(second_of, messages)) if newest is None else START + newest
    for message in messages:
        position.add(identify(message), last)


def covered(position: Position, messages: Sequence[StoredMessage]) -> list[int]:
    """Return the seconds of the messages that have been read."""
    return [second_of(m) - START for m in messages if position.covers(identify(m))]


def test_a_message_is_identified_by_its_node_and_number() -> None:
    first, second = map(identify, stored([5, 5]))
    assert first.second == second.second == START + 5
    assert second.number - first.number == 1
    assert first.node == second.node == int.from_bytes(A, "big")
    assert identify(stored([6], B)[0]) > second


def test_nothing_has_been_read_at_the_beginning() -> None:
    position = Position()
    assert (position.begin, position.newest) == (None, None)
    assert covered(position, stored([0])) == []
    assert Position.parse(position.cursor).begin is None


def test_after_a_message_all_older_ones_of_its_node_have_been_read() -> None:
    messages, others = stored([3, 4, 4, 5]), stored([4], B)
    position = Position.after(messages[1])
    assert position.begin == START + 4
    assert position.newest == identify(messages[1])
    assert covered(position, messages) == [3, 4]
    assert covered(position, others) == []


def test_within_the_overlap_each_message_counts_by_itself() -> None:
    messages = stored([7, 8, 9, 10])
    position = Position()
    read(position, [messages[1], messages[3]])
    assert position.begin == START + 10 - OVERLAP_SECONDS
    assert covered(position, messages) == [8, 10]
    read(position, [messages[0]])
    assert covered(position, messages) == [7, 8, 10]
    assert position.newest == identify(messages[3])


def test_before_the_overlap_the_newest_message_of_each_node_counts() -> None:
    messages, others = stored(range(20)), stored(range(20), B)
    position = Position()
    read(position, others[:8], newest=1000)
    read(position, messages[:10], newest=1000)
    assert position.begin == START + 9
    assert covered(position, messages) == list(range(10))
    assert covered(position, others) == list(range(8))
    read(position, others[9:10], newest=1000)
    assert covered(position, others) == list(range(10))
    assert len(position.cursor) < 70


def test_a_position_lists_only_the_last_seconds() -> None:
    position = Position()
    read(position, stored(range(100)))
    early, later = len(position.cursor), stored(range(100, 10_000))
    read(position, later)
    assert len(position.cursor) <= early + 4
    assert position.begin == START + 9999 - OVERLAP_SECONDS
    assert covered(position, later) == list(range(100, 10_000))


def test_a_position_keeps_a_limited_number_of_nodes() -> None:
    position = Position()
    nodes = [stored([number], number.to_bytes(4, "big"))[0] for number in range(500)]
    for node in nodes:
        read(position, [node])
    assert len(position.cursor) < 250
    # The messages of nodes that it has forgotten are older than those of the others.
    assert covered(position, nodes) == list(range(500))
    assert covered(position, stored([400, 499])) == [400]


def test_a_position_forgets_a_node_after_the_retention() -> None:
    position = Position()
    read(position, stored([0], B))
    read(position, stored([RETENTION_SECONDS]))
    both = len(position.cursor)
    read(position, stored([RETENTION_SECONDS + 10]))
    assert len(position.cursor) < both
    assert covered(position, stored([0, 1], B)) == [0]


def test_rewinding_moves_back_to_the_last_message_of_a_node() -> None:
    behind, ahead, unknown = stored(range(20), B), stored(range(100)), stored([10], b"CCCC")
    position = Position()
    read(position, behind[:5], newest=99)
    read(position, ahead)
    assert covered(position, behind) == list(range(5))
    position.rewind(map(identify, behind[15:]), START + 99)
    assert position.begin == START + 4
    assert covered(position, [*behind, *unknown]) == list(range(5))
    assert covered(position, ahead) == list(range(100))
    position.rewind(map(identify, behind[15:]), START + 10 + RETENTION_SECONDS)
    assert position.begin == START + 10
    position.rewind(map(identify, unknown), START + 99)
    assert position.begin == START + 99 - RETENTION_SECONDS
    position = Position.parse(Position(START + 5).cursor)
    position.rewind(map(identify, unknown), START + 99)
    assert position.begin == START + 5


def test_a_position_lists_a_limited_number_of_messages() -> None:
    messages = stored([0] * 5000)
    position = Position()
    for message in messages[:-1]:
        if message not in (messages[10], messages[-20]):
            read(position, [message])
    assert not position.covers(identify(messages[-1]))
    assert not position.covers(identify(messages[-20])), "it is among the last ones"
    assert position.covers(identify(messages[10])), "later ones have been read"
    assert len(position.cursor) < 2000
    again = Position.parse(position.cursor)
    assert covered(again, messages) == covered(position, messages)


@given(
    begin=st.none() | st.integers(ID_EPOCH, ID_EPOCH + 2**32 - 1),
    read=st.dictionaries(
        st.integers(0, 2**32 - 1),
        st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9, unique=True).map(sorted),
        max_size=4,
    ),
    seed=st.integers(),
)
def test_a_cursor_brings_back_the_position(
    begin: int | None, read: dict[int, list[int]], seed: int
) -> None:
    position = Position(begin, read)
    again = Position.parse(position.cursor)
    assert (again.begin, again.newest, again.cursor) == (begin, position.newest, position.cursor)
    rng = random.Random(seed)
    for node, numbers in read.items():
        for number in (*numbers, numbers[0] - 1, numbers[-1] + 1, rng.choice(numbers) + 1):
            message = NodeMessage(number, node)
            assert again.covers(message) == position.covers(message)


@given(st.text(), st.binary())
def test_any_other_text_is_rejected(text: str, data: bytes) -> None:
    for cursor in (text, f"1.{text}", f"1.{data.hex()}"):
        with pytest.raises(ValueError, match="invalid cursor"):
            Position.parse(cursor)


def test_a_changed_cursor_is_rejected() -> None:
    position = Position()
    read(position, stored([1, 2, 3]))
    cursor = position.cursor
    for place in range(2, len(cursor) - 1):
        changed = "A" if cursor[place] != "A" else "B"
        with pytest.raises(ValueError, match="malformed or truncated"):
            Position.parse(cursor[:place] + changed + cursor[place + 1 :])
