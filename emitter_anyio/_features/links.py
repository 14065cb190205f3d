"""Emitter links: short names for channels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

from emitter_anyio._runtime.events import Events
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.supervisor import Restoration, Restoring
from emitter_anyio._values import requests
from emitter_anyio._values.channels import Key, KeySource, check_channel, check_key_source
from emitter_anyio._values.checks import check_flag, check_text
from emitter_anyio._values.errors import MessageTooLargeError
from emitter_anyio._values.messages import Payload
from emitter_anyio._values.requests import Link

from .publisher import Publisher, TopicOptions, check_qos, topic_options
from .subscriptions import Subscriptions

_NAME = re.compile(r"[a-zA-Z0-9]{1,2}", re.ASCII)

_MAX_DELIVERED_BYTES: Final = 65528
"""The maximum size of channel and payload that the broker delivers (``broker/conn.go``)."""


@dataclass(frozen=True, slots=True, repr=False)
class _LinkArguments:
    """
    The arguments of :meth:`Emitter.link`, to restore it. The ``repr`` does not show the key.

    :ivar text: the key as the broker received it
    """

    key: KeySource
    channel: str
    options: TopicOptions
    text: str = ""


class Links:
    """
    The Emitter links of a client, which each new connection restores.

    :param requester: sends requests
    :param publisher: publishes through Emitter links
    :param subscriptions: subscribes to the channel, if requested
    :param events: emits an error if a link name could not be restored
    """

    def __init__(
        self,
        requester: Requester,
        publisher: Publisher,
        subscriptions: Subscriptions,
        events: Events,
    ) -> None:
        self._requester = requester
        self._publisher = publisher
        self._subscriptions = subscriptions
        self._events = events
        self._links: dict[str, _LinkArguments] = {}

    def finish(self) -> None:
        """Forget all links, because the client has ended."""
        self._links.clear()

    async def make(
        self,
        key: Key,
        channel: str,
        name: str,
        subscribe: bool,
        ttl: int | None,
        echo: bool,
        timeout: Timeout,
    ) -> Link:
        """Create an Emitter link."""
        key = check_key_source(key)
        channel = check_channel(channel)
        name = _check_name(name)
        subscribe, timeout = check_flag("subscribe", subscribe), check_timeout(timeout)
        made = _LinkArguments(key, channel, topic_options(ttl, echo))
        request = partial(self._request, self._requester, name, made, timeout)
        link = await self._requester.with_key(key, request)
        if subscribe:
            await self._subscriptions.subscribe(key, channel, 0, timeout=timeout)
        return link

    async def publish(
        self, name: str, message: Payload, qos: Literal[0, 1], retain: bool, timeout: Timeout
    ) -> None:
        """Publish through an Emitter link."""
        name = _check_name(name)
        payload = self._requester.encode(message)
        qos, retain, timeout = check_qos(qos), check_flag("retain", retain), check_timeout(timeout)
        made = self._links.get(name)
        channel = None if made is None else made.channel
        if channel is not None and len(channel) + len(payload) > _MAX_DELIVERED_BYTES:
            raise MessageTooLargeError(
                f"cannot publish {channel!r} by its short name: channel and payload have "
                f"{len(channel) + len(payload):,} bytes, and the broker delivers at most "
                f"{_MAX_DELIVERED_BYTES:,}"
            )

        async def through(key: str) -> None:
            if made is not None and key != self._links.get(name, made).text:
                # The broker checks the key only at this publish, and has refused the old one.
                await self._request(self._requester, name, made, timeout, key)
            await self._publisher.publish(
                name.encode(), payload, None, channel, qos, retain, timeout
            )

        await self._requester.with_key("" if made is None else made.key, through)

    async def _request(
        self, requester: Requester, name: str, made: _LinkArguments, timeout: Timeout, key: str
    ) -> Link:
        request = requests.link(key, made.channel, name, made.options)
        link = await requester.request(request, timeout)
        self._links[name] = replace(made, text=key)
        return link

    # On a new connection

    def restore(self, restoring: Restoring) -> Iterable[Restoration]:
        """Restore every Emitter link on a new connection."""
        for name, made in self._links.items():
            yield Restoration(
                f"the Emitter link {name!r}",
                partial(self._await_restored, restoring.requester, name, made),
                partial(self._refused, name),
            )

    async def _await_restored(self, requester: Requester, name: str, made: _LinkArguments) -> None:
        request = partial(self._request, requester, name, made, DEFAULT)
        await requester.with_key(made.key, request)

    def _refused(self, name: str, error: Exception) -> None:
        del self._links[name]
        self._events.emit("error", error)


def _check_name(name: str) -> str:
    name = check_text("name", name)
    if not _NAME.fullmatch(name):
        raise ValueError(f"invalid link name {name!r}: expected one or two letters or digits")
    return name
