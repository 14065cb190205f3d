"""One connection, as far as Emitter's semantics are concerned, and what is sent to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ._packets import MAX_REMAINING_LENGTH, Publish, Will

if TYPE_CHECKING:
    from ._topics import Topic, Words

#: What the broker sends, by its use: the acknowledgements, the answer to a request, the refusal of
#: anything else, and what is delivered: messages and changes of presence.
Kind: TypeAlias = Literal[
    "connack", "puback", "suback", "unsuback", "pingresp", "answer", "error", "message"
]

#: Queues an encoded packet of a kind.
Send: TypeAlias = Callable[[Kind, bytes], None]


class Peer:
    """
    A connection's state.

    :param send: queues an encoded packet for it
    :param node: the name of the node that it leads to
    :param number: its number on that node

    :ivar id: what ``me`` answers and presence shows: a new one for every connection
    """

    def __init__(self, send: Send, node: bytes = b"", number: int = 0) -> None:
        self.send = send
        self.number = number
        self.id: str = connection_id(node, number)
        self._username = ""
        self._will: Will | None = None
        self._links: dict[str, Topic] = {}
        self._subscribed: dict[Words, str] = {}
        self._watched: set[Words] = set()

    @property
    def username(self) -> str:
        """What presence shows beside the id, or ``""``."""
        return self._username

    @property
    def links(self) -> Mapping[str, Topic]:
        """The topics that have a short name here, by this name."""
        return self._links

    @property
    def subscribed(self) -> Mapping[Words, str]:
        """The subscriptions, oldest first: each channel by its words."""
        return self._subscribed

    @property
    def channels(self) -> list[str]:
        """The channels of the subscriptions, oldest first."""
        return list(self._subscribed.values())

    @property
    def watched(self) -> Set[Words]:
        """The channels whose presence changes it is sent."""
        return self._watched

    def introduce(self, username: str, will: Will | None) -> None:
        """Take over what CONNECT says."""
        self._username, self._will = username, will

    def take_will(self) -> Will | None:
        """Give the will, and forget it."""
        will, self._will = self._will, None
        return will

    def link(self, name: str, topic: Topic) -> None:
        """Give a topic a short name."""
        self._links[name] = topic

    def add_subscription(self, words: Words, channel: str) -> bool:
        """Add a subscription, and return whether it is a new one."""
        new = words not in self._subscribed
        if new:
            self._subscribed[words] = channel
        return new

    def remove_subscription(self, words: Words) -> str | None:
        """Remove a subscription, and return its channel, or ``None`` if there was none."""
        return self._subscribed.pop(words, None)

    def watch(self, words: Words, wanted: bool) -> bool:
        """Begin or end the feed of a channel's presence, and return whether this is a change."""
        if wanted == (words in self._watched):
            return False
        if wanted:
            self._watched.add(words)
        else:
            self._watched.remove(words)
        return True

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
