"""Nodes that store messages and answer for each other, as a cluster of Emitter does. No I/O."""

from __future__ import annotations

import base64
import json
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from emitter_anyio import StoredMessage
from emitter_anyio._features.stored import (
    BrokerFacts,
    NodeProbe,
    PageRequest,
    Reading,
    Reply,
    Unreadable,
)
from emitter_anyio._values.channels import level_hash

START = 1700000000
"""The first second of these tests."""
NOW = START + 100000
LIMIT = 65536
CONTRACT = 0x12345678
PREFIX = (CONTRACT ^ level_hash("a")).to_bytes(4, "big")
TAIL = b"".join(word.to_bytes(4, "big") for word in (CONTRACT, level_hash("a")))


def second_of(message: StoredMessage) -> int:
    return int(message.time.timestamp())


def size_of(message: StoredMessage) -> int:
    return len(message.id) + len(message.channel) + len(message.binary)


class Node:
    """
    What one node stores.

    :param name: four bytes, which stand in its ids
    :param count: where its counter begins; those of two nodes have nothing to do with each other
    """

    def __init__(self, name: bytes, count: int = 0) -> None:
        self.name = name
        self.count = count
        self.kept: list[StoredMessage] = []  # newest first

    def store(self, second: int, binary: bytes = b"", channel: str = "a/") -> StoredMessage:
        self.count += 1
        numbers = (0xFFFFFFFF - (second - 1514764800), 0xFFFFFFFF - self.count)
        key = b"".join(number.to_bytes(4, "big") for number in numbers)
        message = StoredMessage(
            PREFIX + key + self.name + TAIL, datetime.fromtimestamp(second, UTC), channel, binary
        )
        self.kept.insert(bisect_left(self.kept, message.id, key=lambda m: m.id), message)
        return message

    def answer(self, request: PageRequest) -> list[StoredMessage]:
        """Look up as ``storage/ssd.go`` does: seek, and step over what is found there."""
        begin = 0
        if request.cursor is not None:
            begin = bisect_left(self.kept, request.cursor, key=lambda m: m.id) + 1
        found: list[StoredMessage] = []
        size = 0
        for message in self.kept[begin:]:
            second = second_of(message)
            if len(found) == request.last or (request.since is not None and second < request.since):
                break
            if request.until is not None and second > request.until:
                continue
            size += size_of(message)
            if size > LIMIT:
                break
            found.append(message)
        return found


class Nodes:
    """
    A cluster, as seen through its first node.

    :param random: how what is of one second is mixed; it keeps its order unless given
    """

    def __init__(self, *nodes: Node, chance: random.Random | None = None) -> None:
        self.nodes = list(nodes)
        self.chance = chance
        self.may_count = True
        self.missing: set[bytes] = set()
        self.page_requests: list[PageRequest] = []

    @property
    def kept(self) -> list[StoredMessage]:
        return [message for node in self.nodes for message in node.kept]

    def answer(self, request: PageRequest | NodeProbe) -> Reply:
        if isinstance(request, NodeProbe):
            return Reply(None, self.may_count and len(self.nodes) > 1)
        self.page_requests.append(request)
        there = [node for node in self.nodes if node.name not in self.missing]
        found = [message for node in there for message in node.answer(request)]
        if self.chance is not None and len(found) > 12:
            self.chance.shuffle(found)
        found.sort(key=second_of)
        found = found[max(0, len(found) - request.last) :]
        slow = len(there) < len(self.nodes)
        return Reply(found if json_size(found) <= LIMIT else None, slow)


def json_size(messages: list[StoredMessage]) -> int:
    fields = [
        {
            "id": base64.b64encode(message.id).decode(),
            "channel": message.channel,
            "payload": base64.b64encode(message.binary).decode(),
        }
        for message in messages
    ]
    answer = {"req": 65535, "messages": fields}
    return len(json.dumps(answer, separators=(",", ":"))) + len("emitter/history/") + 2


def read(
    answer: Callable[[PageRequest | NodeProbe], Reply],
    last: int = 10**6,
    since: int | None = None,
    until: int | None = None,
    now: int = NOW,
    broker: BrokerFacts | None = None,
) -> Iterator[StoredMessage | Unreadable]:
    """Read all that there is, the newest first."""
    steps = Reading(last, since, until, now, broker or BrokerFacts(), "a").steps()
    try:
        step = next(steps)
        while True:
            if isinstance(step, PageRequest | NodeProbe):
                step = steps.send(answer(step))
            else:
                yield step
                step = next(steps)
    except StopIteration:
        return
