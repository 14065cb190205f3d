"""Emitter's semantics: who may do what, and who gets which message. No I/O.

What the recorded conversations leave open was seen in the broker's ``internal/service``.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

from anyio import sleep

from ._cluster import Ban, Cluster
from ._keys import EXTEND, LOAD, READ, STORE, WRITE, Key, License, expiry, permissions
from ._matching import Matcher, Subscriptions, Trie
from ._peer import Peer, Send, connection_id, deliver, to_json
from ._refusals import EXTEND_KEY, RefusedError
from ._storage import RETAINED, Storage, Stored, merge
from ._topics import Topic, Words, parse

if TYPE_CHECKING:
    from ._packets import Publish

PATIENCE = 2.0
"""Seconds that a node waits for the others' stored messages (``provider/storage/ssd.go``)."""


class Exchange:
    """
    The state of a broker, or of one node of a cluster, and what its clients do to it.

    :param license: whose keys are taken
    :param matcher: how filters match
    :param cluster: the other nodes; none unless given
    :param patience: for how many seconds a node that does not answer about what it stores is waited
        for; a status of presence, for which no node answers, waits half of it
    """

    def __init__(
        self,
        license: License,
        matcher: Matcher = "emitter",
        cluster: Cluster[Exchange] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.license = license
        self.bans: dict[str, Ban] = {}
        self.storage: Storage = Storage(license.contract)
        self.subscriptions: Subscriptions[_Receiver] = Subscriptions(matcher)
        self.watchers: Trie[Peer] = Trie(matcher)
        self.cluster: Cluster[Exchange] = Cluster() if cluster is None else cluster
        self.cluster.join(self)
        self.name: bytes = secrets.token_bytes(8)
        # Real nodes that start together count their connections from the same number.
        self._numbers = itertools.count()
        self._patience = patience
        self._grant = lru_cache(maxsize=4096)(self._find_key)

    def now(self) -> float:
        """Give the broker's time, in unix seconds."""
        return time.time() + self.cluster.ahead

    def new_peer(self, send: Send) -> Peer:
        """
        Make the state of a new connection.

        :param send: queues an encoded packet for it
        """
        return Peer(send, self.name, next(self._numbers))

    def publish(self, peer: Peer, topic: Topic, packet: Publish) -> None:
        """
        Take a message that a client publishes.

        :raises RefusedError: if the key does not permit it
        """
        key = self._entitle(topic, WRITE)
        ttl = (topic.number("ttl") or 0) & 0xFFFFFFFF or RETAINED * packet.retain
        excluded = peer if topic.number("me") == 0 else None
        self.spread(topic, packet.payload, ttl * key.allows(STORE), excluded)

    def spread(
        self, topic: Topic, payload: bytes, ttl: int = 0, excluded: Peer | None = None
    ) -> None:
        """
        Keep a message, and send it to all whom its channel reaches.

        :param ttl: for how many seconds it is kept, if at all
        :param excluded: who does not get it
        """
        if ttl:
            self.storage.add(self.now(), ttl, topic.channel, topic.words, payload)
        receivers = self.subscriptions.receivers(topic.words, excluded, self._elsewhere())
        for node in receivers:
            if isinstance(node, Exchange):
                self.cluster.send(self, node, partial(node.take_over, topic, payload))
        deliver(_peers(receivers), "message", topic.channel, payload)

    def take_over(self, topic: Topic, payload: bytes) -> None:
        """Send a message of another node to the clients here: every group draws a member again."""
        receivers = self.subscriptions.receivers(topic.words)
        deliver(_peers(receivers), "message", topic.channel, payload)

    async def subscribe(self, peer: Peer, text: str) -> None:
        """
        Enter a subscription, and replay what its key may load.

        :raises RefusedError: when it may not
        """
        topic = parse(text.replace("#", "#/").replace("//", "/"))
        key = self._entitle(topic, READ)
        self.add_subscription(peer, topic)
        if key.allows(LOAD):
            for message in await self.query(topic):
                deliver((peer,), "message", message.channel, message.payload)

    def unsubscribe(self, peer: Peer, text: str) -> None:
        """
        End a subscription; one that there is not is fine.

        :raises RefusedError: when it may not
        """
        topic = parse(text)
        self._entitle(topic, READ)
        channel = peer.remove_subscription(topic.words)
        if channel is not None:
            self.subscriptions.remove(topic.words, peer)
            self._announce_everywhere("unsubscribe", peer, topic.words, channel)

    def add_subscription(self, peer: Peer, topic: Topic) -> None:
        """Add a subscription; one that exists stays as it is."""
        if peer.add_subscription(topic.words, topic.channel):
            self.subscriptions.add(topic.words, peer)
            self._announce_everywhere("subscribe", peer, topic.words, topic.channel)

    def watch(self, peer: Peer, words: Words, wanted: bool) -> None:
        """Begin or end the feed of presence changes at and below a channel."""
        if peer.watch(words, wanted):
            change = self.watchers.add if wanted else self.watchers.remove
            change(words, peer)

    def announce(self, words: Words, change: bytes) -> None:
        """Send a change of presence to those here who watch it."""
        deliver(self.watchers.match(words), "message", "emitter/presence/", change)

    def leave(self, peer: Peer) -> None:
        """End what a connection had, and publish its will: a clean end is no different here."""
        for words, channel in self._remove_all(peer):
            self._announce_everywhere("unsubscribe", peer, words, channel)
        will = peer.take_will()
        if will is not None:
            try:
                topic = parse(will.topic)
                key = self._entitle(topic, WRITE)
            except RefusedError:
                return  # nobody is left to be told
            if not topic.wild:
                self.spread(topic, will.payload, RETAINED * (will.retain and key.allows(STORE)))

    def abandon(self, peer: Peer) -> None:
        """
        End what a connection had when this node is killed: its will is lost.

        The other nodes announce that it ended. But as real ones do, each makes the id from its own
        name, instead of that of the node which is gone. So this is the id of its own connection
        with the same number, if there is one.
        """
        peer.take_will()
        removed = self._remove_all(peer)
        for other in self.cluster.others(self):
            who = {**peer.who(), "id": connection_id(other.name, peer.number)}
            for words, channel in removed:
                change = self._change("unsubscribe", who, channel)
                self.cluster.do(other, partial(other.announce, words, change))

    async def query(self, topic: Topic, after: bytes = b"") -> list[Stored]:
        """Find the stored messages for which a topic's options ask: one, unless they say more."""
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
        """Find who would get a message; those on other nodes are waited for, and never there."""
        found = self.subscriptions.receivers(words, elsewhere=self._elsewhere())
        if self.cluster.others(self):
            await sleep(self._patience / 2)
        return _peers(found)

    def authorize(self, topic: Topic, permission: int) -> Key:
        """
        Give the key of a topic, if it is good for it.

        :raises RefusedError: with 401, when it is not
        """
        key = self._grant(topic.key, topic.channel)
        if topic.key in self.bans and self.bans[topic.key].banned:
            key = None
        if key is None or not key.allows(permission) or key.expired(self.now()):
            raise RefusedError(401)
        return key

    @property
    def banned(self) -> set[str]:
        """The keys that are banned."""
        return {key for key, ban in self.bans.items() if ban.banned}

    def ban(self, key: str, banned: bool = True) -> None:
        """Ban a key, or lift its ban, on all nodes."""
        news = {key: self.cluster.new_ban(banned)}
        self.learn(news)
        for other in self.cluster.others(self):
            self.cluster.send(self, other, partial(other.learn, news))

    def learn(self, bans: Mapping[str, Ban]) -> None:
        """Take over what another node has been told of keys, if it is newer."""
        for key, ban in bans.items():
            self.bans[key] = max(ban, self.bans.get(key, ban))

    def restart(self, forget: bool) -> None:
        """Store as another process of this node does, which may have lost what was stored."""
        self.storage.restart(forget)

    def keygen(self, channel: str, letters: str, ttl: int) -> str:
        """
        Make a channel key.

        :raises RefusedError: for a channel that cannot be a target
        """
        key = self.license.blank_key().aimed_at(channel)
        granted, expires = permissions(letters), expiry(self.now(), ttl)
        return self.license.encrypt(replace(key, permissions=granted, expires=expires))

    def _elsewhere(self) -> dict[_Receiver, Subscriptions[_Receiver]]:
        return {other: other.subscriptions for other in self.cluster.others(self)}

    def _entitle(self, topic: Topic, permission: int) -> Key:
        """Authorize what an extend key is no good for."""
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
        """Remove all subscriptions of a connection and what it watches, and give the former."""
        for watched in list(peer.watched):
            self.watch(peer, watched, False)
        removed = list(peer.subscribed.items())
        for words, _ in removed:
            peer.remove_subscription(words)
            self.subscriptions.remove(words, peer)
        return removed

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
