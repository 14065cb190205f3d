"""A broker that the environment specifies, for programs that can also use a development broker."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from emitter_anyio._backend.interrupts import uninterrupted

from ._broker import Broker


class ConfiguredBroker:
    """
    The broker that the environment specifies, or else a new development broker::

        async with ConfiguredBroker() as broker, connect(broker.url) as emitter:
            key = await emitter.keygen(broker.secret_key, "chat/", "rw")

    If ``EMITTER_URL`` and ``EMITTER_SECRET`` are set, they are the URL and the secret key of a
    running broker. Otherwise, entering starts a :class:`Broker`, and leaving stops it.

    :raises RuntimeError: on entering, if only one of the two variables is set

    :ivar url: the URL for ``connect()``
    :ivar secret_key: the secret key, for ``keygen`` and ``keyban``
    :ivar own: the development broker, or ``None`` if the environment specifies a broker
    """

    def __init__(self) -> None:
        self.url: str = ""
        self.secret_key: str = ""
        self.own: Broker | None = None

    @uninterrupted
    async def __aenter__(self) -> Self:
        url, secret_key = os.environ.get("EMITTER_URL"), os.environ.get("EMITTER_SECRET")
        if bool(url) != bool(secret_key):
            missing = "EMITTER_SECRET" if url else "EMITTER_URL"
            raise RuntimeError(
                f"{missing} is not set: set both EMITTER_URL and EMITTER_SECRET to use a running "
                "broker, or neither to start a development broker"
            )
        if url and secret_key:
            self.url, self.secret_key = url, secret_key
        else:
            self.own = await Broker().__aenter__()
            self.url, self.secret_key = self.own.url, self.own.secret_key
        return self

    @uninterrupted
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        own, self.own = self.own, None
        if own is not None:
            await own.__aexit__(exc_type, exc, traceback)
