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
from emitter_anyio._values.channels import Key, check_channel, check_key_source
from emitter_anyio._values.checks import check_flag, check_text
from emitter_anyio._values.errors import MessageTooLargeError
from emitter_anyio._values.messages import Payload, encode_payload
from emitter_anyio._values.requests import Link

from .publisher import Publisher, TopicOptions, check_qos, topic_options
from .subscriptions import Subscriptions

_NAME = re.compile(r"[a-zA-Z0-9]{1,2}", re.ASCII)

_MAX_DELIVERED_BYTES: Final = 65528
"""The broker delivers at most this many bytes of channel and payload."""


@dataclass(frozen=True, slots=True, repr=False)
class _Made:
    """
    How a link was made, to make it again. Its ``repr`` does not show the key.

    :ivar text: the key as the broker got it
    """

    key: Key
    channel: str
    options: TopicOptions
    text: str = ""


class Links:
    """
    Makes Emitter links and publishes through them.

    :param requester: sends requests
    :param publisher: publishes
    :param subscriptions: subscribes to a link's channel, if wanted
    :param events: gets errors of links that could not be restored
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
        self._links: dict[str, _Made] = {}

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
        """Make a link."""
        key = check_key_source(key)
        channel = check_channel(channel)
        name = _check_name(name)
        subscribe, timeout = check_flag("subscribe", subscribe), check_timeout(timeout)
        made = _Made(key, channel, topic_options(ttl, echo))
        ask = partial(self._ask, self._requester, name, made, timeout)
        link = await self._requester.with_key(key, ask)
        if subscribe:
            await self._subscriptions.subscribe(key, channel, 0, timeout=timeout)
        return link

    async def publish(
        self, name: str, message: Payload, qos: Literal[0, 1], retain: bool, timeout: Timeout
    ) -> None:
        """Publish through a link."""
        name = _check_name(name)
        payload = encode_payload(message)
        qos, retain, timeout = check_qos(qos), check_flag("retain", retain), check_timeout(timeout)
        made = self._links.get(name)
        channel = None if made is None else made.channel
        if channel is not None and len(channel) + len(payload) > _MAX_DELIVERED_BYTES:
            raise MessageTooLargeError(
                f"channel and payload have {len(channel) + len(payload)} bytes; through a link "
                f"the broker cannot send on more than {_MAX_DELIVERED_BYTES}"
            )

        async def through(key: str) -> None:
            if made is not None and key != self._links.get(name, made).text:
                # The broker checks the key only now, and has refused the one that it has.
                await self._ask(self._requester, name, made, timeout, key)
            await self._publisher.publish(
                name.encode(), payload, None, channel, qos, retain, timeout
            )

        await self._requester.with_key("" if made is None else made.key, through)

    async def _ask(
        self, requester: Requester, name: str, made: _Made, timeout: Timeout, key: str
    ) -> Link:
        asked = requests.link(key, made.channel, name, made.options)
        link = await requester.request(asked, timeout)
        self._links[name] = replace(made, text=key)
        return link

    # On a new connection

    def restore(self, restoring: Restoring) -> Iterable[Restoration]:
        """Make every link again."""
        for name, made in self._links.items():
            yield Restoration(
                f"the link {name!r}",
                partial(self._restore_one, restoring.requester, name, made),
                partial(self._refused, name),
            )

    async def _restore_one(self, requester: Requester, name: str, made: _Made) -> None:
        ask = partial(self._ask, requester, name, made, DEFAULT)
        await requester.with_key(made.key, ask)

    def _refused(self, name: str, error: Exception) -> None:
        del self._links[name]
        self._events.emit("error", error)


def _check_name(name: str) -> str:
    name = check_text("the name of a link", name)
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name of a link is one or two letters or digits, not {name!r}")
    return name
