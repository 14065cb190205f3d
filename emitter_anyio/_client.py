"""The client."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import Any, Final, Literal, TypeAlias

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from . import _requests as requests
from ._calling import Caller
from ._channels import (
    Key,
    check_channel,
    check_key,
    check_source,
    check_target,
    format_topic,
)
from ._checks import check_flag, check_int, check_text, check_whole, is_whole
from ._conversation import DEFAULT, Timeout, check_timeout
from ._errors import MessageTooLargeError
from ._messages import Payload, encode_payload
from ._options import Options, make_options
from ._reconnecting import Restoration
from ._requests import ChannelKey, Link, Me
from ._watching import Watcher

_TopicOptions: TypeAlias = tuple[tuple[str, int | None], ...]

_LINK = re.compile(r"[a-zA-Z0-9]{1,2}", re.ASCII)

_MAX_DELIVERED: Final = 65528
"""The broker sends on no more than so many bytes of channel and payload."""

_TOPICS: Final = 1024
"""So many topics are kept ready to be published to."""


@dataclass(frozen=True, slots=True, repr=False)
class _Made:
    """How a link was made, to make it again; its ``repr`` does not show the key."""

    key: Key
    channel: str
    options: _TopicOptions
    text: str = ""
    """The key as the broker was told it."""


def connect(options: Mapping[str, Any] | str | None = None, /, **keywords: Any) -> Emitter:
    """
    Make a client; nothing happens until it is entered.

    :param options: a mapping of options, as in the original SDK, or a URL: ``mqtt://`` (port 8080
        unless said), ``mqtts://`` (port 443), ``unix://`` or, with wsproto, ``ws://`` (8080) and
        ``wss://`` (443), which may have a path
    :param keywords: options; ``host`` (``"api.emitter.io"``), ``port`` (443, or 8080 if not
        secure), ``secure`` (``True``), ``servers`` (URLs to try in turn, instead), ``keepalive``
        (30 s, from 1 to 60), ``username``, ``password``, ``client_id``, ``will`` (a
        :class:`Will`), ``ssl_context`` (verified by the system's authorities),
        ``connect_timeout`` (10 s for each server), ``request_timeout`` (10 s for each awaited
        answer; ``None`` never), ``disconnect_timeout`` (5 s), ``matcher`` (``"emitter"`` or
        ``"mqtt"``, as the broker is configured), ``max_message_size`` (65536 bytes),
        ``allow_collisions`` (``False``; for brokers that keep channels of equal hashes apart),
        ``connectable`` (an ``anyio.abc.ByteStreamConnectable`` instead of host and TLS),
        ``reconnect`` (``Backoff()``: a link that is lost comes back; ``None``: one link only),
        ``while_down`` (``"wait"`` until it is back, or ``"raise"``: what a call does meanwhile)
    :return: a client to be entered
    :raises TypeError: if an option is unknown, of the wrong kind, or said twice with two values
    :raises ValueError: if a value is out of its range
    :raises ImportError: if WebSocket is wanted, and wsproto is not there
    """
    return Emitter(make_options(options, keywords))


class Emitter(Caller, Watcher):
    """
    A client of an Emitter broker; :func:`connect` makes one.

    It lives inside ``async with``, or in a task group by ``await task_group.start(emitter.run)``,
    on asyncio and on Trio. The body starts connected. Entering it again after it ended is fine.

    A link that is lost comes back, with subscriptions, groups, presence and links confirmed before
    ``connect`` is emitted again. Calls that waited for an answer raise
    :class:`ConnectionLostError`, as their outcome is unknown; calls made meanwhile wait. Publishes
    of ``qos=0`` of which no byte was handed over go out first on the next link, in order; those
    handed over are never sent again, and ``statistics().uncertain`` counts them. When the link is
    gone for good (``reconnect=None``, or its tries used up), the body is cancelled and the block
    raises :class:`ConnectionLostError`.

    Every verb may be cancelled at any time: there is never half a packet on the wire, and the
    client stays usable. Every awaited verb is a checkpoint, but ``publish(qos=0)``, which notices
    cancellation at least at every 16th call and yields at least at every 64th.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._topics: dict[tuple[object, ...], bytes] = {}
        self._largest = options.max_message_size - 4
        """How many bytes topic and payload have at most, whatever the QoS."""
        self._links: dict[str, _Made] = {}
        self._restorers.append(self._restore_links)

    def _begin(self) -> None:
        super()._begin()
        self._links.clear()

    def __repr__(self) -> str:
        servers = ", ".join(map(str, self._options.servers))
        return f"<Emitter {servers}, {self._state}>"

    async def publish(
        self,
        key: Key,
        channel: str,
        message: Payload,
        ttl: int | None = None,
        *,
        qos: Literal[0, 1] = 0,
        retain: bool = False,
        echo: bool = True,
        timeout: Timeout = DEFAULT,
    ) -> None:
        """
        Publish a message.

        :param key: a key with the permission to write (``w``); or, as wherever a key is taken, an
            ``async`` function that returns one. Its answer is kept, and when the broker refuses
            it, here or after a lost link, the function is asked for another one
        :param channel: the channel, without wildcards
        :param message: bytes-like or ``str`` (as UTF-8); anything else is sent as JSON
        :param ttl: store it for so many seconds; ``None`` or 0 does not. Without the permission to
            store (``s``) the broker delivers it and does not store it
        :param qos: 0 returns when the message is queued, and waits only for room; 1 returns when
            the broker has accepted it, and raises what it refused
        :param retain: store it for as long as the broker keeps messages, 30 days by default
            (needs ``s``)
        :param echo: whether it is delivered to this connection, too
        :param timeout: seconds for the broker to answer with ``qos=1``, instead of
            ``request_timeout``; ``None`` never
        :raises InvalidChannelError: if the broker would not take the channel
        :raises MessageTooLargeError: if the packet has more than ``max_message_size`` bytes, for
            which the broker would close the link
        :raises UnauthorizedError: with ``qos=1``, if the key does not open the channel
        :raises RequestTimeoutError: with ``qos=1``, if the broker did not answer in time
        :raises ConnectionLostError: if the link is lost; with ``qos=1`` the outcome is unknown
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop than the client's, as every verb

        Cancelled while it waits for room, nothing was queued; cancelled later, with ``qos=1``, the
        message may have been sent. A refused publish of ``qos=0`` goes to ``on("error")``.
        """
        # Only plain text may look a topic up: a subclass of str may compare in its own way.
        if not (
            type(key) is str
            and type(channel) is str
            and (ttl is None or type(ttl) is int)
            and type(qos) is int
            and (retain is False or retain is True)
            and (echo is True or echo is False)
            and timeout is DEFAULT
        ):
            retain, echo = check_flag("retain", retain), check_flag("echo", echo)
            ttl, qos = check_whole("ttl", ttl), _check_qos(qos)
            key, channel = check_source(key), check_channel(channel)
            timeout = check_timeout(timeout)
            if not isinstance(key, str):
                payload = encode_payload(message)
                await self._keyed(
                    key,
                    lambda text: self.publish(
                        *(text, channel, payload, ttl),
                        qos=qos,
                        retain=retain,
                        echo=echo,
                        timeout=timeout,
                    ),
                )
                return
        # Not by index: a KeyError would show the key in the tracebacks of the errors below.
        topic = self._topics.get((key, channel, ttl, echo))
        if topic is None:
            topic = self._make_topic(key, channel, ttl, echo)
        payload = message if type(message) is bytes else encode_payload(message)
        link, session = self._connection, self._session
        at_once = (
            self._ready
            and get_ident() == self._owner.thread
            and link is not None
            and link.writer.has_room
            and len(topic) + len(payload) <= self._largest
        )
        # As _publish() does it: each call in between would cost a twentieth.
        if at_once and qos == 0 and session.published & 15:
            assert link is not None
            packet = link.encode_publish(topic, payload, retain, None)
            session.published += 1
            link.writer.write(packet)
        elif at_once and qos == 1 and not session.full:
            self._owner.check()
            sent = self._send_confirmed(topic, payload, key, channel, retain)
            await self._answer(sent, timeout)
        else:
            qos = _check_qos(qos)
            await self._publish(topic, payload, key, channel, qos, retain, timeout)

    async def publish_with_link(
        self,
        name: str,
        message: Payload,
        *,
        qos: Literal[0, 1] = 0,
        retain: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> None:
        """
        Publish through a link, with the options that it was made with.

        :param name: the name that :meth:`link` gave it
        :param message: as in :meth:`publish`
        :param qos: as in :meth:`publish`
        :param retain: as in :meth:`publish`
        :param timeout: seconds for the broker to answer with ``qos=1``, instead of
            ``request_timeout``; ``None`` never
        :raises BadRequestError: with ``qos=1``, if this connection has no link of that name
        :raises UnauthorizedError: with ``qos=1``, if the link's key does not open its channel
        :raises MessageTooLargeError: if the broker could not send it on: over 65528 bytes of
            channel and payload it closes the link or drops the message (its ``conn.go``)
        """
        name = _check_link(name)
        payload = encode_payload(message)
        qos, retain, timeout = _check_qos(qos), check_flag("retain", retain), check_timeout(timeout)
        made = self._links.get(name)
        channel = None if made is None else made.channel
        if channel is not None and len(channel) + len(payload) > _MAX_DELIVERED:
            raise MessageTooLargeError(
                f"channel and payload have {len(channel) + len(payload)} bytes; through a link "
                f"the broker cannot send on more than {_MAX_DELIVERED}"
            )

        async def through(key: str) -> None:
            if made is not None and key != self._links.get(name, made).text:
                # The broker looks at the key only now, and has refused the one that it was told.
                await self._ask_for_link(name, made, timeout, key)
            await self._publish(name.encode(), payload, None, channel, qos, retain, timeout)

        await self._keyed("" if made is None else made.key, through)

    async def flush(self, *, timeout: Timeout = DEFAULT) -> float:
        """
        Wait until the broker has taken all that was sent before.

        It is a PINGREQ, which the broker answers in its place behind the rest.

        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the round trip in seconds
        :raises RequestError: the first refusal of a publish of ``qos=0`` since the last flush
        :raises RequestTimeoutError: if the broker did not answer in time
        :raises ConnectionLostError: if the link is lost
        """
        timeout = check_timeout(timeout)
        await self._room()
        start = anyio.current_time()
        refusal = await self._answer(self._session.ping(), timeout)
        if refusal is not None:
            raise refusal
        return anyio.current_time() - start

    async def keygen(
        self,
        key: Key,
        channel: str,
        permissions: str = "rw",
        ttl: int = 0,
        *,
        timeout: Timeout = DEFAULT,
    ) -> ChannelKey:
        """
        Have the broker make a key.

        :param key: the broker's master secret; with a key that may extend (``e``) a private
            channel is made, below the given one
        :param channel: what the key opens: ``a/b/`` just that, ``a/#/`` all below ``a/``; at most
            23 levels. A target that ends in ``+/``, but for ``+/`` alone, opens nothing
        :param permissions: letters: ``r`` read, ``w`` write, ``s`` store, ``l`` load,
            ``p`` presence, ``e`` extend, ``x`` execute
        :param ttl: for how many seconds it opens; 0 is for ever
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the key and its channel
        :raises UnauthorizedError: if ``key`` may not make keys
        """
        key = check_source(key)
        channel = check_target(channel)
        ttl = check_int("ttl", ttl, 0)
        timeout = check_timeout(timeout)
        permissions = check_text("permissions", permissions, " such as 'rw'")
        if unknown := set(permissions) - set("rwslpex"):
            raise ValueError(
                f"permissions has {', '.join(sorted(map(repr, unknown)))}, which Emitter does not "
                "know; there are r, w, s, l, p, e and x"
            )

        async def ask(text: str) -> ChannelKey:
            return await self._request(requests.keygen(text, channel, permissions, ttl), timeout)

        return await self._keyed(key, ask)

    async def keyban(
        self, secret: Key, target: Key, banned: bool = True, *, timeout: Timeout = DEFAULT
    ) -> bool:
        """
        Ban a key, or take that back.

        A banned key is refused at once; what was subscribed with it goes on. The broker may take
        a minute to believe that it is banned no more.

        :param secret: the broker's master secret
        :param target: the key
        :param banned: whether it is to be banned
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: whether it is banned now
        :raises UnauthorizedError: if ``secret`` may not ban
        """
        secret, target = check_source(secret), check_source(target)
        banned, timeout = check_flag("banned", banned), check_timeout(timeout)
        banning = await self._key_of(target)

        async def ask(text: str) -> bool:
            return await self._request(requests.keyban(text, banning, banned), timeout)

        return await self._keyed(secret, ask)

    async def link(
        self,
        key: Key,
        channel: str,
        name: str,
        *,
        subscribe: bool = False,
        ttl: int | None = None,
        echo: bool = True,
        timeout: Timeout = DEFAULT,
    ) -> Link:
        """
        Make a short name for a channel, to publish to with :meth:`publish_with_link`.

        It cannot be taken back, and lasts as long as the client: a new connection gets it, too.
        The broker looks at the key only when the name is used.

        :param key: a key with the permission to write (``w``), or a function as in
            :meth:`publish`
        :param channel: the channel
        :param name: one or two letters or digits
        :param subscribe: whether to subscribe to the channel too, as an awaited
            :meth:`subscribe` with ``last=0`` does; it needs ``r``
        :param ttl: store what is published through it for so many seconds (needs ``s``)
        :param echo: whether what is published through it is delivered to this connection, too
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the name, and the channel with its options
        :raises UnauthorizedError: with ``subscribe``, if the key may not read; the link is there
        """
        key = check_source(key)
        channel = check_channel(channel)
        name = _check_link(name)
        subscribe, timeout = check_flag("subscribe", subscribe), check_timeout(timeout)
        options = _topic_options(ttl, echo)
        ask = partial(self._ask_for_link, name, _Made(key, channel, options), timeout)
        made = await self._keyed(key, ask)
        if subscribe:
            await self.subscribe(key, channel, 0, timeout=timeout)
        return made

    async def _ask_for_link(self, name: str, made: _Made, timeout: Timeout, key: str) -> Link:
        asked = requests.link(key, made.channel, name, made.options)
        link = await self._request(asked, timeout)
        self._links[name] = replace(made, text=key)
        return link

    def _restore_links(self) -> Iterable[Restoration]:
        for name, made in self._links.items():
            yield Restoration(
                f"the link {name!r}",
                partial(self._restore_link, name, made),
                partial(self._link_refused, name),
            )

    async def _restore_link(self, name: str, made: _Made) -> None:
        await self._keyed(made.key, partial(self._ask_for_link, name, made, DEFAULT))

    def _link_refused(self, name: str, error: Exception) -> None:
        del self._links[name]
        self._emit("error", error)

    async def me(self, *, timeout: Timeout = DEFAULT) -> Me:
        """
        Ask the broker who this connection is.

        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the connection's id, and its links
        """
        return await self._request(requests.me(), check_timeout(timeout))

    async def _publish(
        self,
        topic: bytes,
        payload: bytes,
        key: str | None,
        channel: str | None,
        qos: int,
        retain: bool,
        timeout: Timeout,
    ) -> None:
        if qos == 0:
            await (checkpoint_if_cancelled() if self._session.published & 63 else checkpoint())
            self._check_size(topic, payload, qos)
            await self._room()
            self._send_publish(topic, payload, retain)
        else:
            self._check_size(topic, payload, qos)
            await self._room()
            sent = self._send_confirmed(topic, payload, key, channel, retain)
            await self._answer(sent, timeout)

    def _make_topic(self, key: str, channel: str, ttl: int | None, echo: bool) -> bytes:
        options = _topic_options(ttl, echo)
        topic = format_topic(check_key(key), check_channel(channel), options).encode()
        if len(self._topics) >= _TOPICS:
            self._topics.clear()
        self._topics[key, channel, ttl, echo] = topic
        return topic


def _check_link(name: str) -> str:
    name = check_text("the name of a link", name)
    if not _LINK.fullmatch(name):
        raise ValueError(f"the name of a link is one or two letters or digits, not {name!r}")
    return name


def _check_qos(qos: int) -> Literal[0, 1]:
    if not is_whole(qos):
        raise TypeError(f"qos must be an int, not {type(qos).__name__}")
    if qos not in (0, 1):
        raise ValueError(f"qos is 0 or 1, not {qos!r}: Emitter answers QoS 2 as though it were 1")
    return 1 if qos else 0


def _topic_options(ttl: int | None, echo: bool) -> _TopicOptions:
    return ("ttl", check_whole("ttl", ttl) or None), ("me", None if check_flag("echo", echo) else 0)
