"""One connection, as far as Emitter's semantics are concerned, and what is sent to it."""

from __future__ import annotations

import base64
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ._packets import MAX_REMAINING_LENGTH, Publish, Will

if TYPE_CHECKING:
    from ._topics import Topic, Words

#: What the broker sends, by its use: the acknowledgements, the answer to a request, the refusal of
#: anything else, and what is delivered: messages and changes of presence.
Kind: TypeAlias = Literal[
    "connack", "puback", "suback", "unsuback", "pingresp", "answer", "error", "message"
]


class Peer(ABC):
    """
    A connection's state.

    :param node: the name of the node that it leads to
    :param number: its number on that node
    """

    def __init__(self, node: bytes = b"", number: int = 0) -> None:
        self.number = number
        #: what ``me`` answers and presence shows: a new one for every connection
        self.id: str = connection_id(node, number)
        self.username: str = ""
        self.will: Will | None = None
        self.links: dict[str, Topic] = {}
        self.subscribed: dict[Words, str] = {}
        self.watched: set[Words] = set()

    def introduce(self, username: str, will: Will | None) -> None:
        """Take over what CONNECT says."""
        self.username, self.will = username, will

    @abstractmethod
    def send(self, kind: Kind, data: bytes) -> None:
        """Queue an encoded packet."""

    def who(self) -> dict[str, str]:
        """Give how presence shows this connection."""
        return {"id": self.id, "username": self.username} if self.username else {"id": self.id}


def connection_id(node: bytes, number: int) -> str:
    """Make an id as connections have it: of the name of a node, and the number on that node."""
    digest = hashlib.sha256(node + number.to_bytes(8, "big")).digest()
    return base64.b32encode(digest[:16]).decode().rstrip("=")


def deliver(peers: Iterable[Peer], kind: Kind, topic: str, payload: bytes) -> None:
    """Send a ``PUBLISH`` to each; as Emitter does, drop in silence what is too large for one."""
    data = b""
    if 2 + len(topic.encode()) + len(payload) <= MAX_REMAINING_LENGTH:
        data = Publish(topic, payload).encode()
    for peer in peers:
        if data:
            peer.send(kind, data)


def to_json(value: dict[str, Any]) -> bytes:
    """Write JSON as Emitter does: no spaces, and what HTML would mind escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()
