"""A model of an Emitter cluster whose nodes store messages and answer history requests. No I/O."""

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
"""The earliest time in these tests, in seconds since the epoch."""
NOW = START + 100000
RESPONSE_LIMIT_BYTES = 65536
CONTRACT = 0x12345678
PREFIX = (CONTRACT ^ level_hash("a")).to_bytes(4, "big")
TAIL = b"".join(word.to_bytes(4, "big") for word in (CONTRACT, level_hash("a")))


def second_of(message: StoredMessage) -> int:
    return int(message.time.timestamp())


def size_of(message: StoredMessage) -> int:
    return len(message.id) + len(message.channel) + len(message.binary)


class Node:
    """
    The storage of one node.

    :param name: four bytes, part of the ids of its messages
    :param count: the initial value of the node's message counter
    """

    def __init__(self, name: bytes, count: int = 0) -> None:
        self.name = name
        self.count = count
        self.stored: list[StoredMessage] = []  # newest first

    def store(self, second: int, binary: bytes = b"", channel: str = "a/") -> StoredMessage:
        self.count += 1
        numbers = (0xFFFFFFFF - (second - 1514764800), 0xFFFFFFFF - self.count)
        key = b"".join(number.to_bytes(4, "big") for number in numbers)
        message = StoredMessage(
            PREFIX + key + self.name + TAIL, datetime.fromtimestamp(second, UTC), channel, binary
        )
        self.stored.insert(bisect_left(self.stored, message.id, key=lambda m: m.id), message)
        return message

    def answer(self, request: PageRequest) -> list[StoredMessage]:
        """Look up messages as ``storage/ssd.go`` does: seek to the cursor, skip its message."""
        begin = 0
        if request.cursor is not None:
            begin = bisect_left(self.stored, request.cursor, key=lambda m: m.id) + 1
        found: list[StoredMessage] = []
        size = 0
        for message in self.stored[begin:]:
            second = second_of(message)
            if len(found) == request.last or (request.since is not None and second < request.since):
                break
            if request.until is not None and second > request.until:
                continue
            size += size_of(message)
            if size > RESPONSE_LIMIT_BYTES:
                break
            found.append(message)
        return found


class Nodes:
    """
    A cluster, as a client of its first node sees it.

    :param rng: shuffles messages of the same second; without it, they keep their order
    """

    def __init__(self, *nodes: Node, rng: random.Random | None = None) -> None:
        self.nodes = list(nodes)
        self.rng = rng
        self.may_count = True
        self.missing: set[bytes] = set()
        self.page_requests: list[PageRequest] = []

    @property
    def stored(self) -> list[StoredMessage]:
        return [message for node in self.nodes for message in node.stored]

    def answer(self, request: PageRequest | NodeProbe) -> Reply:
        if isinstance(request, NodeProbe):
            return Reply(None, self.may_count and len(self.nodes) > 1)
        self.page_requests.append(request)
        reachable = [node for node in self.nodes if node.name not in self.missing]
        found = [message for node in reachable for message in node.answer(request)]
        if self.rng is not None and len(found) > 12:
            self.rng.shuffle(found)
        found.sort(key=second_of)
        found = found[max(0, len(found) - request.last) :]
        slow = len(reachable) < len(self.nodes)
        return Reply(found if json_size(found) <= RESPONSE_LIMIT_BYTES else None, slow)


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


def read_history(
    answer: Callable[[PageRequest | NodeProbe], Reply],
    last: int = 10**6,
    since: int | None = None,
    until: int | None = None,
    now: int = NOW,
    broker: BrokerFacts | None = None,
) -> Iterator[StoredMessage | Unreadable]:
    """Read the history, newest first."""
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
