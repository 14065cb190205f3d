"""Failover past servers that refuse clients, fail in TLS or MQTT, or do not answer."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, NamedTuple

import anyio
import pytest
import trustme

from emitter_anyio import ConnectError, ConnectRefusedError, RemoteProtocolError
from tests.support import tls
from tests.support.connections import connect_once, connect_reconnecting
from tests.support.peer import Peer, Script, tcp_peer

TIMEOUT_SECONDS: Final = 0.5
"""The ``connect_timeout``. A server that does not answer costs a test as much."""


async def refuse_credentials(peer: Peer) -> None:
    await peer.accept(4)


async def refuse_client(peer: Peer) -> None:
    await peer.accept(5)


async def close_immediately(peer: Peer) -> None:
    pass


async def reset_immediately(peer: Peer) -> None:
    peer.reset()


async def stay_silent(peer: Peer) -> None:
    while True:
        await peer.stream.receive()


async def send_slowly(peer: Peer) -> None:
    """Send the bytes of a long packet one by one, so that the client always receives something."""
    await peer.send(b"\x20\x7f")
    while True:
        await peer.send(b"\x00")
        await anyio.sleep(0.05)


async def send_pages(peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await stay_silent(peer)


def untrusted_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


class Failing(NamedTuple):
    """A server that cannot be used, and the cause that the client reports for it."""

    script: Script
    context: ssl.SSLContext | None
    cause: type[Exception]
    text: str


FAILING: Final = {
    "bad credentials": Failing(
        refuse_credentials, tls.server_context(), ConnectRefusedError, "bad user name or password"
    ),
    "not authorized": Failing(
        refuse_client, tls.server_context(), ConnectRefusedError, "not authorized"
    ),
    "closes after TLS": Failing(
        close_immediately, tls.server_context(), EOFError, "closed the connection"
    ),
    "silent after TLS": Failing(
        stay_silent, tls.server_context(), TimeoutError, f"no answer within {TIMEOUT_SECONDS:g} s"
    ),
    "not MQTT": Failing(
        send_pages, tls.server_context(), RemoteProtocolError, "did not answer CONNECT"
    ),
    "untrusted certificate": Failing(
        stay_silent, untrusted_context(), ssl.SSLCertVerificationError, "CERTIFICATE_VERIFY_FAILED"
    ),
    "certificate of another host": Failing(
        stay_silent,
        tls.server_context("other.example"),
        ssl.SSLCertVerificationError,
        "CERTIFICATE_VERIFY_FAILED",
    ),
    "not TLS": Failing(send_pages, None, ssl.SSLError, "TLS"),
    "silent": Failing(stay_silent, None, TimeoutError, f"no answer within {TIMEOUT_SECONDS:g} s"),
    "slow": Failing(
        send_slowly, tls.server_context(), TimeoutError, f"no answer within {TIMEOUT_SECONDS:g} s"
    ),
    "closes": Failing(close_immediately, None, Exception, "during the TLS handshake"),
    "resets": Failing(reset_immediately, None, Exception, "during the TLS handshake"),
}


@asynccontextmanager
async def serving_all(*names: str) -> AsyncGenerator[list[str]]:
    """Run the named failing servers, and yield their URLs."""
    async with AsyncExitStack() as stack:
        ports = [
            await stack.enter_async_context(tcp_peer(each.script, context=each.context))
            for each in map(FAILING.__getitem__, names)
        ]
        yield [f"mqtts://127.0.0.1:{port}" for port in ports]


@asynccontextmanager
async def working(lost: anyio.Event | None = None) -> AsyncGenerator[str]:
    """Run a server that works, until an event if one is given, and yield its URL."""

    async def serve(peer: Peer) -> None:
        if lost is None:
            await peer.serve()
        elif not lost.is_set():
            await peer.accept()
            await lost.wait()

    async with tcp_peer(serve, context=tls.server_context()) as port:
        yield f"mqtts://127.0.0.1:{port}"


OPTIONS: Final[dict[str, Any]] = {
    "ssl_context": tls.client_context(),
    "connect_timeout": TIMEOUT_SECONDS,
    "username": "user",
    "password": "secret-password",
}


@pytest.mark.parametrize("name", FAILING)
async def test_failing_server_is_skipped_when_entering(anyio_backend: object, name: str) -> None:
    async with (
        serving_all(name) as failing,
        working() as url,
        connect_once(servers=[*failing, url], **OPTIONS) as emitter,
    ):
        assert emitter.connection is not None
        assert emitter.connection.server == url


@pytest.mark.parametrize("name", FAILING)
async def test_failing_server_is_skipped_when_reconnecting(
    anyio_backend: object, name: str
) -> None:
    lost = anyio.Event()
    async with (
        working(lost) as one,
        serving_all(name) as failing,
        working() as two,
        connect_reconnecting(servers=[one, *failing, two], **OPTIONS) as emitter,
        emitter.stream("connect") as connected,
    ):
        lost.set()
        await connected.receive()
        assert emitter.connection is not None
        assert emitter.connection.server == two


async def test_error_names_each_failing_server_with_its_cause(anyio_backend: object) -> None:
    async with serving_all(*FAILING) as urls:
        with pytest.raises(ConnectError) as caught:
            async with connect_once(servers=urls, **OPTIONS):
                pass
    error = caught.value
    assert list(error.causes) == urls
    reasons = str(error).removeprefix("could not connect to ").split("; ")
    for url, expected in zip(urls, FAILING.values(), strict=True):
        assert isinstance(error.causes[url], expected.cause)
        assert any(each.startswith(f"{url}: ") and expected.text in each for each in reasons)
    assert OPTIONS["password"] not in str(error)


async def test_permanent_causes_do_not_end_reconnecting(anyio_backend: object) -> None:
    lost = anyio.Event()
    attempts = 0

    async def recover(peer: Peer) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            await peer.accept(4)
        else:
            await peer.serve()

    async with (
        working(lost) as one,
        serving_all("bad credentials", "untrusted certificate") as failing,
        tcp_peer(recover, context=tls.server_context()) as port,
    ):
        servers = [one, *failing, f"mqtts://127.0.0.1:{port}"]
        async with (
            connect_reconnecting(servers=servers, **OPTIONS) as emitter,
            emitter.stream("connect") as connected,
        ):
            lost.set()
            await connected.receive()
            assert emitter.connection is not None
            assert attempts == 3
