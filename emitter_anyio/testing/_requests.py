"""The requests that clients publish to ``emitter/…``, and their replies.

Source of the fields: the handlers in Emitter's ``internal/service``.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ._keys import EXTEND, LOAD, PRESENCE, READ, expiry, permissions
from ._peer import Peer, deliver, to_json
from ._refusals import LINK_NAME, RefusedError
from ._topics import Topic, parse

if TYPE_CHECKING:
    from ._exchange import Exchange
    from ._packets import Publish

_Reply: TypeAlias = dict[str, Any]
_LINK_NAME = re.compile("[a-zA-Z0-9]{1,2}")


async def handle_publish(exchange: Exchange, peer: Peer, packet: Publish) -> None:
    """
    Handle a message or a request that a client publishes.

    :raises RefusedError: if the key does not permit it, or the topic is malformed
    """
    if len(packet.topic.encode()) > 2:
        topic = parse(packet.topic)
    elif packet.topic in peer.links:
        topic = peer.links[packet.topic]
    else:
        raise RefusedError(400)
    if topic.wild:
        raise RefusedError(403)
    if topic.key == "emitter":
        await _answer_request(exchange, peer, topic, packet)
    else:
        exchange.publish(peer, topic, packet)


async def _answer_request(exchange: Exchange, peer: Peer, topic: Topic, packet: Publish) -> None:
    """Handle a request, and send the reply on the topic of the request, with its options."""
    try:
        if len(topic.words) != 1 or topic.words[0] not in _HANDLERS:
            raise RefusedError(404)
        reply = await _HANDLERS[topic.words[0]](exchange, peer, packet.payload)
    except RefusedError as refusal:
        reply = {"status": refusal.status, "message": refusal.message}
    if packet.packet_id:
        reply = {"req": packet.packet_id, **reply}
    deliver((peer,), "reply", f"emitter/{topic.safe}", to_json(reply))


class _Fields:
    """The JSON fields of a request. As in Go, a missing or null field has the zero value."""

    def __init__(self, payload: bytes) -> None:
        try:
            value = json.loads(payload.decode(errors="replace"), parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise RefusedError(400) from None
        if value is not None and not isinstance(value, dict):
            raise RefusedError(400)
        self._values: dict[str, Any] = {name.lower(): v for name, v in (value or {}).items()}

    def text(self, name: str) -> str:
        value = self._get(name, str)
        # JSON can contain a lone surrogate, which cannot be encoded in UTF-8.
        return value.encode(errors="replace").decode() if value else ""

    def flag(self, name: str) -> bool | None:
        value: bool | None = self._get(name, bool)
        return value

    def whole(self, name: str) -> int:
        value: int = self._get(name, int) or 0
        if not -(2**31) <= value < 2**31:
            raise RefusedError(400)
        return value

    def binary(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.text(name), validate=True)
        except ValueError:
            raise RefusedError(400) from None

    def _get(self, name: str, kind: type) -> Any:
        value = self._values.get(name.lower())
        if value is not None and type(value) is not kind:
            raise RefusedError(400)
        return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)


async def _keygen(exchange: Exchange, peer: Peer, payload: bytes) -> _Reply:
    fields, license = _Fields(payload), exchange.license
    text, channel = fields.text("key"), fields.text("channel")
    granted, ttl = permissions(fields.text("type")), fields.whole("ttl")
    try:
        parent = license.decrypt(text)
    except ValueError:
        raise RefusedError(401) from None
    if parent.expired(exchange.now()):
        raise RefusedError(401)
    if parent.is_secret:
        if parent.contract != license.contract:
            raise RefusedError(404)
        if not license.made(parent):
            raise RefusedError(401)
        key = license.blank_key()
    elif parent.allows(EXTEND):
        tail = "#/" if channel.endswith("#/") else ""
        topic = parse(f"{text}/{channel.removesuffix(tail)}")
        if topic.wild:
            raise RefusedError(400)
        key = exchange.authorize(topic, EXTEND)
        granted &= key.permissions & ~EXTEND
        channel = f"{topic.channel}{peer.id}/{tail}"
    else:
        raise RefusedError(401)
    try:
        key = key.with_target(channel)
    except RefusedError as refusal:
        # Like Emitter, use another status if a private channel has too many levels.
        raise RefusedError(500 if parent.allows(EXTEND) else 400, refusal.message) from None
    key = replace(key, permissions=granted, expires=expiry(exchange.now(), ttl))
    return {"status": 200, "key": license.encrypt(key), "channel": channel}


async def _keyban(exchange: Exchange, peer: Peer, payload: bytes) -> _Reply:
    fields = _Fields(payload)
    secret, target = fields.text("secret"), fields.text("target")
    banned = bool(fields.flag("banned"))
    try:
        master, key = exchange.license.decrypt(secret), exchange.license.decrypt(target)
    except ValueError:
        raise RefusedError(401) from None
    if (
        not master.is_secret
        or master.expired(exchange.now())
        or not exchange.license.made(master)
        or key.contract != master.contract
    ):
        raise RefusedError(401)
    exchange.ban(target, banned)
    return {"status": 200, "banned": banned}


async def _link(exchange: Exchange, peer: Peer, payload: bytes) -> _Reply:
    fields = _Fields(payload)
    name, subscribe = fields.text("name"), fields.flag("subscribe")
    text = f"{fields.text('key')}/{fields.text('channel')}"
    if not _LINK_NAME.fullmatch(name):
        raise RefusedError(400, LINK_NAME)
    topic = parse(text)
    peer.link(name, topic)
    if subscribe:
        with suppress(RefusedError):  # Emitter creates the link without checking its key
            exchange.authorize(topic, READ)
            exchange.add_subscription(peer, topic)
    return {"status": 200, "name": name, "channel": topic.safe}


async def _me(exchange: Exchange, peer: Peer, payload: bytes) -> _Reply:
    reply: _Reply = {"status": 200, "id": peer.id}
    if peer.links:
        reply["links"] = {name: topic.safe for name, topic in sorted(peer.links.items())}
    return reply


async def _presence(exchange: Exchange, peer: Peer, payload: bytes) -> _Reply:
    fields = _Fields(payload)
    text, channel = fields.text("key"), fields.text("channel")
    status, changes = fields.flag("status"), fields.flag("changes")
    if not channel.endswith("/"):
        channel += "/"
    topic = parse(f"{text}/{channel}")
    if exchange.authorize(topic, PRESENCE).allows(EXTEND):
        raise RefusedError(401)
    if changes is not None:
        exchange.watch(peer, topic.words, changes)
    if status is False:
        return {"status": 200, "time": 0, "event": "", "channel": "", "who": None}
    return {
        "status": 200,
        "time": int(exchange.now()),
        "event": "status",
        "channel": channel,
        "who": [there.who() for there in await exchange.members(topic.words)],
    }


async def _history(exchange: Exchange, peer: Peer, payload: bytes) -> _Reply:
    fields = _Fields(payload)
    text, after = fields.text("channel"), fields.binary("startFromID")
    topic = parse(text)
    exchange.authorize(topic, LOAD)
    return {
        "messages": [
            {
                "id": base64.b64encode(message.id).decode(),
                "channel": message.channel,
                # Like Go, encode an empty payload as null.
                "payload": base64.b64encode(message.payload).decode() or None,
            }
            for message in await exchange.query(topic, after)
        ]
    }


_HANDLERS: dict[str, Callable[[Exchange, Peer, bytes], Awaitable[_Reply]]] = {
    "keygen": _keygen,
    "keyban": _keyban,
    "link": _link,
    "me": _me,
    "presence": _presence,
    "history": _history,
}
