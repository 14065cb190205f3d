"""Transports: opening connections over TCP, TLS and Unix sockets, and closing them."""

from __future__ import annotations

import errno
import re
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSAttribute, TLSStream

from emitter_anyio import Backoff, ConnectError, ConnectionLostError, Emitter, connect
from emitter_anyio._backend.tasks import Tasks
from emitter_anyio._net.options import make_options
from emitter_anyio._net.transport import (
    SocketTransport,
    StreamTransport,
    _alternate,
    _SocketStream,
    open_transport,
)
from emitter_anyio._net.writer import MAX_QUEUED_BYTES
from emitter_anyio.testing import Broker
from tests.support import packets, tls
from tests.support.connections import connect_once
from tests.support.leaks import open_sockets
from tests.support.memory import MemoryConnectable, MemoryStream, memory_stream_pair
from tests.support.peer import (
    PINGREQ,
    PUBLISH,
    TRANSPORTS,
    Peer,
    SocketStream,
    memory_peer,
    serving,
    tcp_peer,
    unix_peer,
    unix_socket,
)
from tests.support.ports import unanswered_port
from tests.support.steps import all_cancel_styles, cancel_at_step

HINT = "Emitter's default ports are 8080"


async def serve(peer: Peer) -> None:
    await peer.serve()


def refusing_port(host: str = "127.0.0.1") -> int:
    """Return a port that refuses connections."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
    return port


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes ``broker.example`` resolve to ports of 127.0.0.1, in order."""
    look_up = socket.getaddrinfo

    def known(*ports: int) -> None:
        def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host not in ("broker.example", b"broker.example"):
                return look_up(host, port, *args, **options)
            if args[3] & socket.AI_NUMERICHOST:
                raise socket.gaierror(socket.EAI_NONAME, "this is a name")
            found = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            return [(*found, ("127.0.0.1", port)) for port in ports]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return known


# SocketTransport


def socket_pair() -> tuple[SocketTransport, socket.socket]:
    own_end, theirs = socket.socketpair()
    own_end.setblocking(False)
    theirs.setblocking(False)
    return SocketTransport(own_end), theirs


async def test_socket_receives_bytes_and_empty_bytes_at_the_end(anyio_backend: object) -> None:
    transport, peer = socket_pair()
    with peer:
        peer.send(b"ab")
        assert await transport.receive() == b"ab"
        peer.shutdown(socket.SHUT_WR)
        assert await transport.receive() == b""
    await transport.aclose()


async def test_reader_that_finds_no_data_waits_again(anyio_backend: object) -> None:
    own_end, peer = socket.socketpair()
    own_end.setblocking(False)
    transports = (SocketTransport(own_end), SocketTransport(own_end.dup()))
    received = []

    async def receive(transport: SocketTransport) -> None:
        received.append(await transport.receive())
        await transport.aclose()

    with peer:
        async with anyio.create_task_group() as tasks:
            for transport in transports:
                tasks.start_soon(receive, transport)
            await anyio.wait_all_tasks_blocked()
            # Both readers wake up for the first byte, and one of them gets it.
            peer.send(b"a")
            while not received:
                await checkpoint()
            await anyio.wait_all_tasks_blocked()
            assert received == [b"a"]
            peer.send(b"b")
    assert received == [b"a", b"b"]


async def test_send_waits_for_a_full_socket(anyio_backend: object) -> None:
    transport, peer = socket_pair()
    with peer:
        while transport.try_send(bytes(65536)):
            pass
        sent = []

        async def send() -> None:
            sent.append(await transport.send(b"x" * 10))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            assert not sent
            while not sent:
                with suppress(BlockingIOError):
                    peer.recv(1 << 20)
                await checkpoint()
        assert sent == [10]
    await transport.aclose()


@pytest.mark.parametrize("sends", [False, True])
async def test_closing_a_socket_wakes_waiting_tasks(anyio_backend: object, sends: bool) -> None:
    transport, peer = socket_pair()
    woken = []

    async def wait() -> None:
        with pytest.raises(ClosedResourceError):
            await (transport.send(b"x") if sends else transport.receive())
        woken.append(True)

    with peer:
        while sends and transport.try_send(bytes(65536)):
            pass
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await transport.aclose()
            await transport.aclose()
        assert woken
        assert sends or peer.recv(1) == b""


# StreamTransport


async def test_stream_receives_bytes_and_empty_bytes_at_the_end(anyio_backend: object) -> None:
    own_end, peer = memory_stream_pair()
    transport = StreamTransport(own_end)
    assert transport.try_send(b"x") == 0
    assert await transport.send(b"abc") == 3
    assert await peer.receive() == b"abc"
    await peer.send(b"ab")
    assert await transport.receive() == b"ab"
    await peer.send_eof()
    assert await transport.receive() == b""
    await transport.aclose()
    assert own_end.closed


async def test_broken_stream_raises_the_cause(anyio_backend: object) -> None:
    class BrokenStream(MemoryStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            raise anyio.BrokenResourceError from ConnectionResetError("reset by peer")

    own_end, peer = memory_stream_pair()
    transport = StreamTransport(own_end)
    await peer.aclose()
    with pytest.raises(OSError, match="the connection broke"):
        await transport.send(b"x")
    own_end.__class__ = BrokenStream
    with pytest.raises(OSError, match="reset by peer"):
        await transport.receive()
    await transport.aclose()


async def test_send_eof_is_sent_if_the_transport_supports_it(anyio_backend: object) -> None:
    transport, peer = socket_pair()
    with peer:
        await transport.send_eof()
        assert peer.recv(1) == b""
        peer.send(b"still")
        assert await transport.receive() == b"still"
    await transport.aclose()
    await transport.send_eof()
    own_end, memory_peer = memory_stream_pair()
    await StreamTransport(own_end).send_eof()
    with pytest.raises(anyio.EndOfStream):
        await memory_peer.receive()
    # TLS cannot be closed in one direction.
    await StreamTransport(_SocketStream(transport)).send_eof()


async def test_two_tasks_can_send_below_tls(anyio_backend: object) -> None:
    transport, peer = socket_pair()
    stream = _SocketStream(transport)
    received = bytearray()
    with peer:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, b"a" * 1_000_000)
            tasks.start_soon(stream.send, b"b" * 1_000_000)
            while len(received) < 2_000_000:
                await anyio.wait_readable(peer)
                received += peer.recv(1 << 20)
    assert len(re.findall(rb"a+|b+", received)) == 2
    with pytest.raises(NotImplementedError):
        await stream.send_eof()
    await stream.aclose()


async def test_part_of_a_tls_record_counts_as_received(anyio_backend: object) -> None:
    begun, over = anyio.Event(), anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await begun.wait()
        assert isinstance(peer.stream, TLSStream)
        await peer.stream.transport_stream.send(b"\x17\x03\x03\x40\x00")
        await over.wait()

    async with serving("tls", script) as options, connect_once(**options) as emitter:
        assert emitter._slot.connection is not None
        last_heard = emitter._slot.connection._last_heard
        before = last_heard.time
        begun.set()
        while last_heard.time == before:
            await checkpoint()
        over.set()


# Several addresses


@pytest.mark.parametrize("secure", [False, True])
async def test_next_address_is_tried_after_a_refusal(
    resolve: Callable[..., None], secure: bool
) -> None:
    context = tls.server_context("broker.example") if secure else None
    async with tcp_peer(serve, context=context) as port:
        resolve(refusing_port(), port)
        trust = tls.client_context() if secure else None
        async with connect(host="broker.example", secure=secure, ssl_context=trust) as emitter:
            await emitter.flush()


async def test_error_names_each_reason_once_when_no_address_can_be_reached(
    resolve: Callable[..., None],
) -> None:
    resolve(refusing_port(), refusing_port())
    with pytest.raises(ConnectError) as caught:
        async with connect(host="broker.example", secure=False):
            pass
    assert str(caught.value).count("Connection refused") == 1
    assert HINT in str(caught.value)
    (cause,) = caught.value.causes.values()
    assert isinstance(cause.__cause__, ExceptionGroup)
    assert len(cause.__cause__.exceptions) == 2


async def test_unanswered_addresses_time_out_without_a_hint(
    resolve: Callable[..., None],
) -> None:
    with unanswered_port() as hole:
        resolve(hole, hole)
        with pytest.raises(ConnectError, match=r"within 0\.6 s") as caught:
            async with connect(host="broker.example", secure=False, connect_timeout=0.6):
                pass
    assert HINT not in str(caught.value)


async def test_next_address_is_tried_while_one_is_unanswered_without_a_timeout(
    resolve: Callable[..., None],
) -> None:
    async with tcp_peer(serve) as port:
        with unanswered_port() as hole:
            resolve(hole, port)
            async with connect(host="broker.example", secure=False, connect_timeout=None) as one:
                await one.flush()


async def test_addresses_that_answer_in_the_same_turn_leave_one_connection(
    resolve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both attempts have started, and both sockets become writable in the same turn.
    both = anyio.Event()
    waiting = []
    wait_writable = anyio.wait_writable

    async def wait_for_both(sock: socket.socket) -> None:
        waiting.append(sock)
        if len(waiting) == 2:
            both.set()
        await both.wait()
        await wait_writable(sock)

    async with tcp_peer(serve) as one, tcp_peer(serve) as two:
        resolve(one, two)
        with monkeypatch.context() as patch:
            patch.setattr(anyio, "wait_writable", wait_for_both)
            patch.setattr("emitter_anyio._net.transport._is_connected", lambda sock: False)
            async with connect(host="broker.example", secure=False) as emitter:
                patch.undo()
                await emitter.flush()
                assert [sock.fileno() < 0 for sock in waiting].count(True) == 1


async def test_cancelled_connection_attempts_leave_no_socket(resolve: Callable[..., None]) -> None:
    with unanswered_port() as hole:
        resolve(hole, hole, hole)
        with anyio.move_on_after(0.6) as scope:
            async with connect(host="broker.example", secure=False):
                pass
    assert scope.cancelled_caught


async def test_connection_that_is_established_too_late_is_closed(
    resolve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    second_waits, entered = anyio.Event(), anyio.Event()
    waiting = []
    wait_writable = anyio.wait_writable

    async def wait_in_turn(sock: socket.socket) -> None:
        waiting.append(sock)
        if len(waiting) == 1:
            await second_waits.wait()
        elif len(waiting) == 2:
            second_waits.set()
            with anyio.CancelScope(shield=True):
                await entered.wait()
                await wait_writable(sock)
            return
        await wait_writable(sock)

    async with tcp_peer(serve) as one, tcp_peer(serve) as two:
        resolve(one, two)
        with monkeypatch.context() as patch:
            patch.setattr(anyio, "wait_writable", wait_in_turn)
            patch.setattr("emitter_anyio._net.transport._is_connected", lambda sock: False)
            async with connect(host="broker.example", secure=False) as emitter:
                patch.undo()
                entered.set()
                while waiting[1].fileno() >= 0:
                    await checkpoint()
                await emitter.flush()


async def test_entering_in_a_cancelled_scope_tries_no_address_to_the_end(
    resolve: Callable[..., None],
) -> None:
    with unanswered_port() as hole:
        resolve(hole, hole)
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with connect(host="broker.example", secure=False):
                pass
    assert scope.cancelled_caught


def test_address_families_alternate() -> None:
    found = [(family, 0, 0, "", number) for number, family in enumerate((6, 6, 4, 4))]
    assert [entry[4] for entry in _alternate(found)] == [0, 2, 1, 3]
    assert _alternate(found[:2]) == found[:2]


async def test_look_up_without_an_address_raises_connect_error(
    resolve: Callable[..., None],
) -> None:
    resolve()
    with pytest.raises(ConnectError, match="returned no address"):
        async with connect(host="broker.example", secure=False):
            pass


async def test_next_address_is_tried_after_a_refusal_without_a_timeout(
    resolve: Callable[..., None],
) -> None:
    async with tcp_peer(serve) as port:
        resolve(refusing_port(), port)
        async with connect(host="broker.example", secure=False, connect_timeout=None) as emitter:
            await emitter.flush()


@pytest.mark.parametrize("secure", [False, True])
async def test_refused_connection_names_emitters_ports(anyio_backend: object, secure: bool) -> None:
    port = refusing_port()
    with pytest.raises(ConnectError, match=HINT) as caught:
        async with connect(host="127.0.0.1", port=port, secure=secure):
            pass
    text = str(caught.value)
    assert all(number in text for number in ("443", "1883", "8883", f"127.0.0.1:{port}"))
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


@pytest.mark.parametrize("secure", [False, True])
async def test_name_that_does_not_resolve_raises_connect_error(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    def getaddrinfo(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ConnectError, match=r"nowhere\.example:8080: ") as caught:
        async with connect(host="nowhere.example", port=8080, secure=secure):
            pass
    assert isinstance(caught.value.__cause__, socket.gaierror)


@pytest.mark.parametrize("secure", [False, True])
async def test_invalid_host_name_raises_connect_error(anyio_backend: object, secure: bool) -> None:
    with pytest.raises(ConnectError, match=r"'bröker\.\.example'"):
        async with connect(host="bröker..example", secure=secure):
            pass


async def test_look_up_can_time_out_and_be_cancelled(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    proceed, looking_up = threading.Event(), threading.Event()

    def getaddrinfo(*args: Any, **options: Any) -> None:
        if not args[5] & socket.AI_NUMERICHOST:
            looking_up.set()
            proceed.wait()
        raise socket.gaierror(socket.EAI_NONAME, "too late")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        with pytest.raises(ConnectError, match=r"within 0\.05 s"):
            async with connect(host="slow.example", secure=False, connect_timeout=0.05):
                pass

        async def open_it() -> None:
            async with connect(host="slow.example", secure=False):
                pass

        looking_up.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(open_it)
            while not looking_up.is_set():
                await checkpoint()
            tasks.cancel_scope.cancel()
    finally:
        proceed.set()


# Unix sockets


async def test_unix_socket_by_url(anyio_backend: object) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "brok er"
        async with unix_peer(serve, path):
            async with connect(f"unix://{folder}/brok%20er") as emitter:
                await emitter.flush()
                assert emitter.connection is not None
                assert emitter.connection.server == f"unix://{path}"


async def test_refusing_unix_socket_gets_no_hint_about_ports(
    anyio_backend: object,
) -> None:
    with TemporaryDirectory() as folder:
        with unix_socket() as sock:
            sock.bind(f"{folder}/s")
        with pytest.raises(ConnectError, match="Connection refused") as caught:
            async with connect(f"unix://{folder}/s"):
                pass
    assert HINT not in str(caught.value)


async def test_unix_socket_with_a_full_queue_raises_connect_error(anyio_backend: object) -> None:
    with TemporaryDirectory() as folder, ExitStack() as stack:
        listener = stack.enter_context(unix_socket())
        listener.bind(f"{folder}/s")
        listener.listen(0)
        code = 0
        while not code:
            filler = stack.enter_context(unix_socket())
            filler.setblocking(False)
            code = filler.connect_ex(f"{folder}/s")
        assert code == errno.EAGAIN
        with pytest.raises(ConnectError, match="temporarily unavailable"):
            async with connect(f"unix://{folder}/s"):
                pass


@pytest.mark.parametrize("name", ["nothing", "x" * 200])
async def test_missing_unix_socket_raises_connect_error(anyio_backend: object, name: str) -> None:
    with pytest.raises(ConnectError, match=r"No such file|too long"):
        async with connect(f"unix:///tmp/no/{name}"):
            pass


# TLS


async def test_unknown_authority_is_not_trusted(anyio_backend: object) -> None:
    async with tcp_peer(serve, context=tls.server_context()) as port:
        with pytest.raises(ConnectError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            async with connect(f"mqtts://127.0.0.1:{port}"):
                pass
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


async def test_system_authorities_are_read_in_a_thread(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tls.authority().cert_pem.write_to_path(str(tmp_path / "authorities"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authorities"))
    threads = []
    create = ssl.create_default_context

    def create_default_context() -> ssl.SSLContext:
        threads.append(threading.current_thread())
        return create()

    context = tls.server_context()
    monkeypatch.setattr(ssl, "create_default_context", create_default_context)
    async with tcp_peer(serve, context=context) as port:
        async with connect(f"mqtts://127.0.0.1:{port}") as emitter:
            await emitter.flush()
    assert threads
    assert threading.main_thread() not in threads


async def test_certificate_must_match_the_host(anyio_backend: object) -> None:
    async with tcp_peer(serve, context=tls.server_context("other.example")) as port:
        with pytest.raises(ConnectError, match=r"127\.0\.0\.1") as caught:
            async with connect(
                host="127.0.0.1", port=port, secure=True, ssl_context=tls.client_context()
            ):
                pass
    assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value)


async def test_host_is_sent_as_sni(anyio_backend: object) -> None:
    server_names = []
    context = tls.server_context()
    context.sni_callback = lambda sock, name, context: server_names.append(name)
    async with tcp_peer(serve, context=context) as port:
        async with connect(f"mqtts://localhost:{port}", ssl_context=tls.client_context()) as client:
            await client.flush()
    assert server_names == ["localhost"]


async def test_client_can_present_a_certificate(anyio_backend: object) -> None:
    shown: list[dict[str, Any]] = []
    context = tls.server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    tls.authority().configure_trust(context)

    async def script(peer: Peer) -> None:
        certificate: Any = peer.stream.extra(TLSAttribute.peer_certificate)
        shown.append(certificate)
        await peer.serve()

    async with tcp_peer(script, context=context) as port:
        trust = tls.client_context()
        with pytest.raises(ConnectError):
            async with connect(f"mqtts://127.0.0.1:{port}", ssl_context=trust):
                pass
        tls.certificate("client.example").configure_cert(trust)
        async with connect(f"mqtts://127.0.0.1:{port}", ssl_context=trust) as emitter:
            await emitter.flush()
    assert shown[0]["subjectAltName"] == (("DNS", "client.example"),)


@pytest.mark.parametrize("reset", [False, True])
async def test_peer_closing_in_the_tls_handshake_raises_connect_error(
    anyio_backend: object, reset: bool
) -> None:
    async def script(peer: Peer) -> None:
        await peer.stream.receive()
        if reset:
            peer.reset()

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectError) as caught:
            async with connect(f"mqtts://127.0.0.1:{port}", ssl_context=tls.client_context()):
                pass
    text = str(caught.value)
    assert ("reset" in text) == reset
    assert "during the TLS handshake; if it does not use TLS, use mqtt://" in text


async def test_peer_without_tls_raises_connect_error(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.stream.receive()
        await peer.send(packets.CONNACK + bytes(100))
        await peer.stream.receive()

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectError, match="SSL") as caught:
            async with connect(f"mqtts://127.0.0.1:{port}", ssl_context=tls.client_context()):
                pass
    assert isinstance(caught.value.__cause__, ssl.SSLError)


async def test_tls_record_with_many_messages_delivers_all(anyio_backend: object) -> None:
    # Paho on its own socket, read when that is readable, would leave all but one in the record.
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(b"".join(packets.publish("a/", b"%d" % n) for n in range(50)))
        await peer.rest()

    received = []
    async with tcp_peer(script, context=tls.server_context()) as port:
        emitter = connect(f"mqtts://127.0.0.1:{port}", ssl_context=tls.client_context())
        emitter.on("message", lambda message: received.append(int(message.as_string())))
        with anyio.CancelScope() as scope:
            async with emitter:
                while len(received) < 50:
                    await checkpoint()
                scope.cancel()
    assert received == list(range(50))


async def test_missing_client_certificate_gets_a_hint(anyio_backend: object) -> None:
    context = tls.server_context()
    tls.authority().configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    async with Broker(ssl_context=context) as broker:
        with pytest.raises(ConnectError, match="client certificate"):
            async with connect(broker.url, ssl_context=tls.client_context()):
                pass
        with_certificate = tls.client_context()
        tls.certificate("client").configure_cert(with_certificate)
        async with connect(broker.url, ssl_context=with_certificate) as emitter:
            await emitter.flush()


async def test_tls_to_a_plain_port_gets_a_hint(broker: Broker) -> None:
    with pytest.raises(ConnectError, match=r"secure=False"):
        async with connect(host=broker.host, port=broker.port, secure=True):
            pass


async def test_no_hint_about_ports_for_an_address_that_worked_before(
    anyio_backend: object,
) -> None:
    async def serve_once(listener: socket.socket) -> None:
        await anyio.wait_readable(listener)
        sock, _ = listener.accept()
        listener.close()
        peer = Peer(SocketStream(sock))
        await peer.accept()
        await peer.until(PINGREQ)
        await peer.stream.aclose()

    with socket.socket() as listener:
        listener.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve_once, listener)
            with pytest.raises(ConnectionLostError, match="refused") as caught:
                async with connect(url, reconnect=Backoff(0, 0, tries=1)) as emitter:
                    with suppress(ConnectionLostError):
                        await emitter.flush()
                    await anyio.sleep_forever()
    assert HINT not in str(caught.value)


async def test_large_messages_over_tls_in_both_directions(anyio_backend: object) -> None:
    payload = bytes(range(256)) * 255

    async def script(peer: Peer) -> None:
        await peer.accept()
        for _ in range(20):
            packet = await peer.until(PUBLISH)
            await peer.send(packets.publish("a/", packet.payload))
        await peer.answer_all()

    async with tcp_peer(script, context=tls.server_context()) as port:
        emitter = connect(f"mqtts://127.0.0.1:{port}", ssl_context=tls.client_context())
        async with emitter, emitter.stream("message") as messages:
            for _ in range(20):
                await emitter.publish("k", "a/", payload)
            for _ in range(20):
                assert (await messages.receive()).binary == payload


async def test_reset_tls_connection_is_reported(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(PINGREQ)
        peer.reset()

    async with tcp_peer(script, context=tls.server_context()) as port:
        with pytest.raises(ConnectionLostError, match="reset"):
            async with connect_once(
                f"mqtts://127.0.0.1:{port}", ssl_context=tls.client_context()
            ) as emitter:
                await emitter.flush()


async def test_send_eof_on_a_broken_tls_connection_is_ignored(anyio_backend: object) -> None:
    # AnyIO's TLS stream then raises a TypeError instead of its usual NotImplementedError.
    async def script(peer: Peer) -> None:
        await peer.stream.receive()
        peer.reset()

    async with tcp_peer(script, context=tls.server_context()) as port:
        options = make_options(f"mqtts://127.0.0.1:{port}", {"ssl_context": tls.client_context()})
        transport = await open_transport(options.servers[0], options, Tasks(print))
        await transport.send_eof()
        await transport.send(b"x")
        with pytest.raises(OSError, match="reset"):
            await transport.receive()
        assert await transport.receive() == b""
        await transport.send_eof()
        await transport.aclose()


@pytest.mark.parametrize("way", ["settled", "unsettled", "cancelled"])
async def test_closing_does_not_wait_for_a_silent_tls_peer(anyio_backend: object, way: str) -> None:
    closed = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await closed.wait()

    async with tcp_peer(script, context=tls.server_context()) as port:
        before = open_sockets()
        # Leaving waits for disconnect_timeout only if the broker might not have read everything.
        emitter = connect(
            f"mqtts://127.0.0.1:{port}",
            ssl_context=tls.client_context(),
            disconnect_timeout=0.05 if way == "unsettled" else 1000,
        )
        with anyio.CancelScope() as scope:
            async with emitter, anyio.create_task_group() as tasks:
                if way == "unsettled":
                    await emitter.publish("k", "a/", "x")
                if way == "cancelled":
                    tasks.start_soon(flood, emitter)
                    while emitter.statistics().queued_bytes < MAX_QUEUED_BYTES:
                        await checkpoint()
                    scope.cancel()
        # The peer's socket is still open.
        assert len(open_sockets() - before) == 1
        closed.set()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_leaving_with_a_peer_that_reads_nothing_logs_no_lost_connection(
    anyio_backend: object, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    closed = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await closed.wait()

    async with serving(transport, script) as options:
        async with connect(**options, disconnect_timeout=0.05) as emitter:
            while emitter.statistics().queued_bytes < MAX_QUEUED_BYTES:
                await emitter.publish("k", "a/", bytes(65000))
        closed.set()
    assert emitter.state == "closed"
    assert not [text for text in caplog.messages if "lost" in text]


async def flood(emitter: Emitter) -> None:
    while True:
        await emitter.publish("k", "a/", bytes(65000))


# Connectables


async def test_connectable_replaces_host_and_tls(anyio_backend: object) -> None:
    async with memory_peer(serve) as connectable:
        async with connect(connectable=connectable) as emitter:
            await emitter.flush()
    assert connectable.attempts == 1


async def test_tcp_connectable_of_anyio(anyio_backend: object) -> None:
    async with tcp_peer(serve) as port:
        async with connect(connectable=anyio.TCPConnectable("127.0.0.1", port)) as emitter:
            await emitter.flush()


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (OSError("no way there"), "no way there"),
        (anyio.BrokenResourceError(), "BrokenResourceError"),
        (anyio.EndOfStream(), "EndOfStream"),
        (TimeoutError("proxy did not answer"), "proxy did not answer"),
    ],
)
async def test_failing_connectable_raises_connect_error(
    anyio_backend: object, error: Exception, pattern: str
) -> None:
    async def fail(attempt: int) -> None:
        raise error

    connectable = MemoryConnectable(before=fail)
    with pytest.raises(ConnectError, match=pattern) as caught:
        async with connect(connectable=connectable):
            pass
    assert caught.value.__cause__ is error
    connectable.close()


@pytest.mark.virtual_time
async def test_hanging_connectable_times_out_and_the_next_server_is_tried(
    anyio_backend: object,
) -> None:
    async def swallow(attempt: int) -> None:
        if attempt < 3:
            await anyio.sleep_forever()

    async with memory_peer(serve, before=swallow) as connectable:
        start = anyio.current_time()
        servers = [f"mqtt://s{number}.example" for number in range(3)]
        async with connect(servers=servers, connectable=connectable, connect_timeout=7) as emitter:
            assert anyio.current_time() - start == pytest.approx(14)
            assert emitter.connection is not None
            assert emitter.connection.server == "mqtt://s2.example:8080"


# Cancellation


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_opening_can_be_cancelled_at_every_checkpoint(
    anyio_backend: object, transport: str
) -> None:
    before = open_sockets()
    async with serving(transport, serve) as options:
        listening = len(open_sockets())

        async def open_and_leave() -> None:
            async with connect(**options) as emitter:
                await emitter.flush()

        for style in all_cancel_styles():
            step = 0
            while await cancel_at_step(open_and_leave(), step, style):
                step += 1
            # At least three waits: for CONNACK, for PINGRESP and for the end of the connection.
            assert step >= 3
            while len(open_sockets()) > listening:
                # The peer might not have noticed the end of the connection yet.
                await checkpoint()
        if transport == "memory":
            assert all(stream.closed for stream in options["connectable"].streams)
    assert open_sockets() <= before


@pytest.mark.parametrize("secure", [False, True])
async def test_hanging_connection_attempt_can_be_cancelled(
    anyio_backend: object, secure: bool
) -> None:
    received = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.stream.receive()
        received.set()
        await peer.stream.receive()

    async with tcp_peer(script) as port:
        before = open_sockets()
        async with anyio.create_task_group() as tasks:

            async def open_it() -> None:
                async with connect(host="127.0.0.1", port=port, secure=secure):
                    pass

            tasks.start_soon(open_it)
            await received.wait()
            tasks.cancel_scope.cancel()
        while open_sockets() > before:
            await checkpoint()


async def test_nagles_algorithm_is_disabled(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets: list[socket.socket] = []

    class RecordingSocket(socket.socket):
        def connect_ex(self, address: Any) -> int:
            sockets.append(self)
            return super().connect_ex(address)

    async with tcp_peer(serve) as port:
        monkeypatch.setattr(socket, "socket", RecordingSocket)
        async with connect(f"mqtt://127.0.0.1:{port}"):
            (sock,) = sockets
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
