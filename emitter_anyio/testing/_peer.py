"""The state of a connection in Emitter's semantics, and the packets sent to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ._packets import MAX_REMAINING_LENGTH, Publish, Will

if TYPE_CHECKING:
    from ._topics import Topic, Words

#: The kinds of packets that the broker sends: acknowledgements, the reply to a request
#: (``"reply"``), the refusal of anything else (``"error"``), and messages and presence events.
Kind: TypeAlias = Literal[
    "connack", "puback", "suback", "unsuback", "pingresp", "reply", "error", "message"
]

#: A function that queues an encoded packet of a kind.
Send: TypeAlias = Callable[[Kind, bytes], None]


class Peer:
    """
    The state of a connection.

    :param send: a function that queues an encoded packet for the client
    :param node: the name of the node that the client is connected to
    :param number: the number of the connection on that node

    :ivar id: the unique id of the connection, as in ``me`` and presence
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
        """The user name shown in presence, or ``""``."""
        return self._username

    @property
    def links(self) -> Mapping[str, Topic]:
        """The topics of the connection's links, by name."""
        return self._links

    @property
    def subscribed(self) -> Mapping[Words, str]:
        """The channels of the subscriptions by their words, oldest first."""
        return self._subscribed

    @property
    def channels(self) -> list[str]:
        """The channels of the subscriptions, oldest first."""
        return list(self._subscribed.values())

    @property
    def watched(self) -> Set[Words]:
        """The channels whose presence events the client receives."""
        return self._watched

    def set_identity(self, username: str, will: Will | None) -> None:
        """Set the user name and the will of a CONNECT."""
        self._username, self._will = username, will

    def take_will(self) -> Will | None:
        """Return the will and remove it."""
        will, self._will = self._will, None
        return will

    def link(self, name: str, topic: Topic) -> None:
        """Create or replace a link to a topic."""
        self._links[name] = topic

    def add_subscription(self, words: Words, channel: str) -> bool:
        """Add a subscription, and return whether it is new."""
        new = words not in self._subscribed
        if new:
            self._subscribed[words] = channel
        return new

    def remove_subscription(self, words: Words) -> str | None:
        """Remove a subscription, and return its channel, or ``None`` if it does not exist."""
        return self._subscribed.pop(words, None)

    def watch(self, words: Words, wanted: bool) -> bool:
        """Start or end the presence feed of a channel, and return whether this is a change."""
        if wanted == (words in self._watched):
            return False
        if wanted:
            self._watched.add(words)
        else:
            self._watched.remove(words)
        return True

    def who(self) -> dict[str, str]:
        """Return this connection as presence shows it."""
        return {"id": self.id, "username": self.username} if self.username else {"id": self.id}


def connection_id(node: bytes, number: int) -> str:
    """Return the id of a connection with this number on a node."""
    digest = hashlib.sha256(node + number.to_bytes(8, "big")).digest()
    return base64.b32encode(digest[:16]).decode().rstrip("=")


def deliver(peers: Iterable[Peer], kind: Kind, topic: str, payload: bytes) -> None:
    """Send a ``PUBLISH`` to each connection; like Emitter, drop one that is too large."""
    data = b""
    if 2 + len(topic.encode()) + len(payload) <= MAX_REMAINING_LENGTH:
        data = Publish(topic, payload).encode()
    for peer in peers:
        if data:
            peer.send(kind, data)


def to_json(value: dict[str, Any]) -> bytes:
    """Serialize to JSON like Go: without spaces, and with HTML's special characters escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()
