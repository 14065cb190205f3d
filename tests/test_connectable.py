"""TLS and WebSocket over a ``connectable``."""

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
from tests.support.connections import connect_once


class RecordingConnectable(ByteStreamConnectable):
    """Connects by TCP and records the streams."""

    def __init__(self, broker: Broker) -> None:
        self._connectable = TCPConnectable(broker.host, broker.port)
        self.streams: list[ByteStream] = []

    async def connect(self) -> ByteStream:
        self.streams.append(await self._connectable.connect())
        return self.streams[-1]


ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "mqtts": (("mqtts://localhost",), {}),
    "wss": (("wss://localhost/mqtt",), {}),
    "secure": ((), {"host": "localhost", "secure": True}),
}


@pytest.mark.parametrize(("args", "options"), ARGUMENTS.values(), ids=ARGUMENTS)
async def test_secure_scheme_adds_tls_to_connectable(
    anyio_backend: object, args: tuple[str, ...], options: dict[str, Any]
) -> None:
    async with Broker(ssl_context=tls.server_context()) as broker:
        connectable = RecordingConnectable(broker)
        context = tls.client_context()
        async with connect_once(
            *args, connectable=connectable, ssl_context=context, **options
        ) as emitter:
            key = broker.keygen("a/", "rw")
            async with emitter.subscribe(key, "a/") as messages:
                await emitter.publish(key, "a/", "x", qos=1)
                assert (await messages.receive()).as_string() == "x"
        assert len(connectable.streams) == 1


@pytest.mark.parametrize(
    ("url", "options"), [("mqtt://h", {}), ("ws://h", {}), (None, {}), (None, {"host": "h"})]
)
async def test_connectable_without_secure_scheme_uses_no_tls(
    broker: Broker, url: str | None, options: dict[str, Any]
) -> None:
    args = () if url is None else (url,)
    async with connect_once(*args, connectable=RecordingConnectable(broker), **options) as emitter:
        await emitter.flush()


async def test_failed_tls_handshake_closes_stream(broker: Broker) -> None:
    connectable = RecordingConnectable(broker)
    with pytest.raises(ConnectError, match="TLS"):
        async with connect_once("mqtts://localhost", connectable=connectable):
            raise AssertionError("entered")
    (stream,) = connectable.streams
    with pytest.raises(anyio.ClosedResourceError):
        await stream.receive()


async def test_certificate_is_checked_against_host_of_url(anyio_backend: object) -> None:
    async with Broker(ssl_context=tls.server_context("other.example")) as broker:
        with pytest.raises(ConnectError) as caught:
            async with connect_once(
                "mqtts://localhost",
                connectable=RecordingConnectable(broker),
                ssl_context=tls.client_context(),
            ):
                raise AssertionError("entered")
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
