"""Emitter's semantics: permissions, delivery, presence and storage. Without I/O.

Source: recorded conversations with Emitter 3.1 and, for the rest, its ``internal/service``.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

from anyio import sleep

from ._cluster import Ban, Cluster
from ._keys import EXTEND, LOAD, READ, STORE, WRITE, Key, License, expiry, permissions
from ._matching import Matcher, Subscriptions, Trie
from ._peer import Peer, Send, connection_id, deliver, to_json
from ._refusals import EXTEND_KEY, RefusedError
from ._storage import RETAINED_SECONDS, Storage, Stored, merge
from ._topics import Topic, Words, parse

if TYPE_CHECKING:
    from ._packets import Publish

SURVEY_TIMEOUT_SECONDS = 2.0
"""The time that Emitter waits for the replies of other nodes (``provider/storage/ssd.go``)."""


class Exchange:
    """
    The state of a broker or of a cluster node, and the operations of its clients.

    :param license: the licence whose keys are accepted
    :param matcher: the matcher of subscriptions
    :param cluster: the cluster to join, or ``None`` for a new one
    :param patience: the seconds to wait for nodes that do not reply with stored messages; a
        presence status, for which no node replies, waits half as long
    """

    def __init__(
        self,
        license: License,
        matcher: Matcher = "emitter",
        cluster: Cluster[Exchange] | None = None,
        patience: float = SURVEY_TIMEOUT_SECONDS,
    ) -> None:
        self.license = license
        self.bans: dict[str, Ban] = {}
        self.storage: Storage = Storage(license.contract)
        self._new_subscriptions: Callable[[], Subscriptions[_Receiver]]
        self._new_subscriptions = partial(Subscriptions, matcher)
        self.subscriptions: Subscriptions[_Receiver] = self._new_subscriptions()
        # What nodes know that do not know all subscriptions.
        self._known: dict[Exchange, Subscriptions[_Receiver]] = {}
        self.watchers: Trie[Peer] = Trie(matcher)
        self.cluster: Cluster[Exchange] = Cluster() if cluster is None else cluster
        self.cluster.join(self)
        self.name: bytes = secrets.token_bytes(8)
        # Like Emitter nodes that start together, count connections from the same number.
        self._numbers = itertools.count()
        self._patience = patience
        self._find_key_cached = lru_cache(maxsize=4096)(self._find_key)

    def now(self) -> float:
        """Return the broker's time in Unix seconds."""
        return self.cluster.now()

    @property
    def subscription_count(self) -> int:
        """The number of subscriptions on this node and, as in Emitter, on those it reaches."""
        nodes = (self, *self.cluster.reached(self))
        return sum(node.subscriptions.count for node in nodes)

    def new_peer(self, send: Send) -> Peer:
        """
        Create the state of a new connection.

        :param send: a function that queues an encoded packet for the client
        """
        return Peer(send, self.name, next(self._numbers))

    def publish(self, peer: Peer, topic: Topic, packet: Publish) -> None:
        """
        Handle a message that a client publishes.

        :raises RefusedError: if the key does not permit it
        """
        key = self._authorize_message(topic, WRITE)
        ttl = (topic.number("ttl") or 0) & 0xFFFFFFFF or RETAINED_SECONDS * packet.retain
        excluded = peer if topic.number("me") == 0 else None
        self.store_and_send(topic, packet.payload, ttl * key.allows(STORE), excluded)

    def store_and_send(
        self, topic: Topic, payload: bytes, ttl: int = 0, excluded: Peer | None = None
    ) -> None:
        """
        Store a message and send it to its receivers.

        :param ttl: the seconds to store the message for, or 0 not to store it
        :param excluded: a connection that does not receive it
        """
        if ttl:
            self.storage.add(self.now(), ttl, topic.channel, topic.words, payload)
        receivers = self.subscriptions.receivers(topic.words, excluded, self._other_nodes())
        for node in receivers:
            if isinstance(node, Exchange):
                self.cluster.send(self, node, partial(node.deliver_from_node, topic, payload))
        deliver(_peers(receivers), "message", topic.channel, payload)

    def deliver_from_node(self, topic: Topic, payload: bytes) -> None:
        """Send a message from another node to the clients of this one.

        Each group chooses a member again, so two members might receive the message.
        """
        receivers = self.subscriptions.receivers(topic.words)
        deliver(_peers(receivers), "message", topic.channel, payload)

    async def subscribe(self, peer: Peer, text: str) -> None:
        """
        Add a subscription, and replay stored messages if its key permits loading.

        :raises RefusedError: if the key does not permit reading
        """
        topic = parse(text.replace("#", "#/").replace("//", "/"))
        key = self._authorize_message(topic, READ)
        self.add_subscription(peer, topic)
        if key.allows(LOAD):
            for message in await self.query(topic):
                deliver((peer,), "message", message.channel, message.payload)

    def unsubscribe(self, peer: Peer, text: str) -> None:
        """
        End a subscription, if it exists.

        :raises RefusedError: if the key does not permit reading
        """
        topic = parse(text)
        self._authorize_message(topic, READ)
        channel = peer.remove_subscription(topic.words)
        if channel is not None:
            self._remove_subscription(topic.words, peer)
            self._announce_everywhere("unsubscribe", peer, topic.words, channel)

    def add_subscription(self, peer: Peer, topic: Topic) -> None:
        """Add a subscription, unless it exists."""
        if peer.add_subscription(topic.words, topic.channel):
            for known in (self.subscriptions, *self._known.values()):
                known.add(topic.words, peer)
            self._announce_everywhere("subscribe", peer, topic.words, topic.channel)

    def watch(self, peer: Peer, words: Words, wanted: bool) -> None:
        """Start or end the feed of presence events at and below a channel."""
        if peer.watch(words, wanted):
            change = self.watchers.add if wanted else self.watchers.remove
            change(words, peer)

    def announce(self, words: Words, change: bytes) -> None:
        """Send a presence event to the clients of this node that watch the channel."""
        deliver(self.watchers.match(words), "message", "emitter/presence/", change)

    def leave(self, peer: Peer) -> None:
        """End the subscriptions of a connection and publish its will, also after DISCONNECT."""
        for words, channel in self._remove_all(peer):
            self._announce_everywhere("unsubscribe", peer, words, channel)
        will = peer.take_will()
        if will is not None:
            try:
                topic = parse(will.topic)
                key = self._authorize_message(topic, WRITE)
            except RefusedError:
                return  # the client that would receive the error has disconnected
            if not topic.wild:
                self.store_and_send(
                    topic, will.payload, RETAINED_SECONDS * (will.retain and key.allows(STORE))
                )

    def abandon(self, peer: Peer) -> None:
        """
        End the subscriptions of a connection when this node is killed, and discard its will.

        The other nodes announce the end. Like Emitter, each computes the id of the connection from
        its own name instead of the name of the killed node. The result is the id of the connection
        with the same number on that node, if there is one.
        """
        peer.take_will()
        for other in self.cluster.others(self):
            self._announce_loss(other, peer)
        self._remove_all(peer)

    def announce_loss(self, node: Exchange) -> None:
        """Announce the subscribers of this node to another node as :meth:`abandon` does."""
        for peer in _peers(self.subscriptions.subscribers()):
            self._announce_loss(node, peer)

    def hide_subscriptions(self, node: Exchange) -> None:
        """Make another node send no messages for the present subscriptions of this one."""
        self._known[node] = self._new_subscriptions()

    def known_to(self, node: Exchange) -> Subscriptions[_Receiver]:
        """Return the subscriptions of this node that another node knows."""
        return self._known.get(node, self.subscriptions)

    async def query(self, topic: Topic, after: bytes = b"") -> list[Stored]:
        """Return the stored messages that the options of a topic select, by default one."""
        last, since, until = (topic.number(option) for option in ("last", "from", "until"))
        last = 1 if last is None else last

        def look(node: Exchange) -> list[Stored]:
            return node.storage.query(self.now(), topic.words, last, since, until, after)

        found = look(self)
        answers, missing = self.cluster.survey(self, look)
        if missing:
            await sleep(self._patience)
        return merge([found, *answers], last)

    async def members(self, words: Words) -> list[Peer]:
        """
        Return the connections of this node that would receive a message.

        Like Emitter, wait for the replies of other nodes, although they never arrive.
        """
        found = self.subscriptions.receivers(words, other_nodes=self._other_nodes())
        if self.cluster.reached(self):
            await sleep(self._patience / 2)
        return _peers(found)

    def authorize(self, topic: Topic, permission: int) -> Key:
        """
        Return the decrypted key of a topic.

        :raises RefusedError: with status 401, if the key is invalid, banned or expired, or does not
            have the permission for the channel
        """
        key = self._find_key_cached(topic.key, topic.channel)
        if topic.key in self.bans and self.bans[topic.key].banned:
            key = None
        if key is None or not key.allows(permission) or key.expired(self.now()):
            raise RefusedError(401)
        return key

    @property
    def banned(self) -> set[str]:
        """The banned keys."""
        return {key for key, ban in self.bans.items() if ban.banned}

    def ban(self, key: str, banned: bool = True) -> None:
        """Ban a key or lift its ban, on all connected nodes."""
        news = {key: self.cluster.new_ban(banned)}
        self.merge_bans(news)
        for other in self.cluster.others(self):
            self.cluster.send(self, other, partial(other.merge_bans, news))

    def merge_bans(self, bans: Mapping[str, Ban]) -> None:
        """Take over newer decisions from another node."""
        for key, ban in bans.items():
            self.bans[key] = max(ban, self.bans.get(key, ban))

    def restart(self, forget: bool) -> None:
        """Restart the storage like a new process, and delete the messages if ``forget`` is set."""
        self.storage.restart(forget)

    def keygen(self, channel: str, letters: str, ttl: int) -> str:
        """
        Generate a channel key.

        :raises RefusedError: if the channel is not a valid target
        """
        key = self.license.blank_key().with_target(channel)
        granted, expires = permissions(letters), expiry(self.now(), ttl)
        return self.license.encrypt(replace(key, permissions=granted, expires=expires))

    def _other_nodes(self) -> dict[_Receiver, Subscriptions[_Receiver]]:
        return {other: other.known_to(self) for other in self.cluster.others(self)}

    def _authorize_message(self, topic: Topic, permission: int) -> Key:
        """Authorize an operation that extend keys do not permit."""
        key = self.authorize(topic, permission)
        if key.allows(EXTEND):
            raise RefusedError(401, EXTEND_KEY)
        return key

    def _find_key(self, text: str, channel: str) -> Key | None:
        try:
            key = self.license.decrypt(text)
        except ValueError:
            return None
        return key if self.license.made(key) and key.opens(channel) else None

    def _remove_all(self, peer: Peer) -> list[tuple[Words, str]]:
        """Remove the subscriptions and presence feeds of a connection, and return the former."""
        for watched in list(peer.watched):
            self.watch(peer, watched, False)
        removed = list(peer.subscribed.items())
        for words, _ in removed:
            peer.remove_subscription(words)
            self._remove_subscription(words, peer)
        return removed

    def _remove_subscription(self, words: Words, peer: Peer) -> None:
        for known in (self.subscriptions, *self._known.values()):
            if known.holds(words, peer):
                known.remove(words, peer)

    def _announce_loss(self, node: Exchange, peer: Peer) -> None:
        who = {**peer.who(), "id": connection_id(node.name, peer.number)}
        for words, channel in peer.subscribed.items():
            if self.known_to(node).holds(words, peer):
                change = self._change("unsubscribe", who, channel)
                self.cluster.do(node, partial(node.announce, words, change))

    def _announce_everywhere(self, event: str, peer: Peer, words: Words, channel: str) -> None:
        change = self._change(event, peer.who(), channel)
        self.announce(words, change)
        for other in self.cluster.others(self):
            self.cluster.send(self, other, partial(other.announce, words, change))

    def _change(self, event: str, who: dict[str, str], channel: str) -> bytes:
        return to_json({"time": int(self.now()), "event": event, "channel": channel, "who": who})


def _peers(receivers: Iterable[_Receiver]) -> list[Peer]:
    return [receiver for receiver in receivers if isinstance(receiver, Peer)]


_Receiver: TypeAlias = Peer | Exchange
