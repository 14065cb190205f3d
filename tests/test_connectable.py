"""TLS and WebSocket over a connectable."""

from __future__ import annotations

import ssl
from typing import Any

import anyio
import pytest
from anyio import TCPConnectable
from anyio.abc import ByteStream, ByteStreamConnectable

from emitter_anyio import ConnectError
from emitter_anyio.testing import Broker
from tests.support import tls
from tests.support.links import one_link


class Counting(ByteStreamConnectable):
    """Connects by TCP, and keeps the streams."""

    def __init__(self, broker: Broker) -> None:
        self._below = TCPConnectable(broker.host, broker.port)
        self.streams: list[ByteStream] = []

    async def connect(self) -> ByteStream:
        self.streams.append(await self._below.connect())
        return self.streams[-1]


WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "mqtts": (("mqtts://localhost",), {}),
    "wss": (("wss://localhost/mqtt",), {}),
    "secure": ((), {"host": "localhost", "secure": True}),
}


@pytest.mark.parametrize("way", WAYS)
async def test_tls_is_layered_on_it(anyio_backend: object, way: str) -> None:
    url, options = WAYS[way]
    async with Broker(ssl_context=tls.server_context()) as broker:
        connectable = Counting(broker)
        context = tls.client_context()
        async with one_link(
            *url, connectable=connectable, ssl_context=context, **options
        ) as emitter:
            key = broker.keygen("a/", "rw")
            async with emitter.subscribe(key, "a/") as messages:
                await emitter.publish(key, "a/", "x", qos=1)
                assert (await messages.receive()).as_string() == "x"
        assert len(connectable.streams) == 1


@pytest.mark.parametrize(
    ("url", "options"), [("mqtt://h", {}), ("ws://h", {}), (None, {}), (None, {"host": "h"})]
)
async def test_without_a_secure_scheme_there_is_no_tls(
    broker: Broker, url: str | None, options: dict[str, Any]
) -> None:
    way = () if url is None else (url,)
    async with one_link(*way, connectable=Counting(broker), **options) as emitter:
        await emitter.flush()


async def test_a_handshake_that_fails_closes_the_stream(broker: Broker) -> None:
    connectable = Counting(broker)
    with pytest.raises(ConnectError, match="TLS"):
        async with one_link("mqtts://localhost", connectable=connectable):
            raise AssertionError("entered")
    (stream,) = connectable.streams
    with pytest.raises(anyio.ClosedResourceError):
        await stream.receive()


async def test_the_certificate_is_for_the_host_of_the_url(anyio_backend: object) -> None:
    async with Broker(ssl_context=tls.server_context("other.example")) as broker:
        with pytest.raises(ConnectError) as caught:
            async with one_link(
                "mqtts://localhost",
                connectable=Counting(broker),
                ssl_context=tls.client_context(),
            ):
                raise AssertionError("entered")
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
