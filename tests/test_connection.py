"""One connection: opening it, receiving, and closing it in every way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    ConnectError,
    ConnectionLostError,
    ConnectRefusedError,
    Emitter,
    EmitterMessage,
    EventStream,
    RemoteProtocolError,
    SlowConsumerError,
    Will,
)
from emitter_anyio._backend.tasks import Tasks
from emitter_anyio._net.opening import open_connection
from emitter_anyio._net.options import make_options
from emitter_anyio._net.transport import SocketTransport
from emitter_anyio._net.writer import MAX_QUEUED_BYTES
from emitter_anyio._protocol.packets import Event, Publish
from emitter_anyio._protocol.wants import Wants
from tests.support import packets
from tests.support.connections import connect_once
from tests.support.leaks import open_sockets
from tests.support.memory import MemoryConnectable, MemoryStream
from tests.support.peer import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PUBLISH,
    TRANSPORTS,
    Packet,
    Peer,
    memory_peer,
    serving,
    tcp_peer,
)
from tests.support.steps import all_cancel_styles, cancel_at_step


async def serve(peer: Peer) -> None:
    await peer.serve()


async def ignore(peer: Peer) -> None:
    """Receive packets and never answer."""
    await peer.packet()
    while await peer.packet():
        pass


# Opening: from CONNECT to CONNACK


@pytest.mark.virtual_time
async def test_connect_to_peer_without_connack_times_out(anyio_backend: object) -> None:
    async with memory_peer(ignore) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectError, match="within 7 s") as caught:
            async with connect_once(connectable=connectable, connect_timeout=7):
                pass
        assert anyio.current_time() - start == pytest.approx(7)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_connect_to_peer_that_reads_nothing_times_out(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await anyio.sleep(100)

    async with memory_peer(script, capacity=5) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectError, match="within 7 s"):
            async with connect_once(connectable=connectable, connect_timeout=7):
                pass
        assert anyio.current_time() - start == pytest.approx(7)


@pytest.mark.virtual_time
@pytest.mark.parametrize(("pause", "works"), [(1.9, True), (2.1, False)])
async def test_connect_timeout_covers_all_steps(
    anyio_backend: object, pause: float, works: bool
) -> None:
    async def before(attempt: int) -> None:
        await anyio.sleep(2)

    async def script(peer: Peer) -> None:
        await peer.packet()
        for number in range(4):
            await anyio.sleep(pause)
            await peer.send(packets.CONNACK[number : number + 1])
        await peer.answer_all()

    async with memory_peer(script, before=before) as connectable:
        emitter = connect_once(connectable=connectable, connect_timeout=10)
        if works:
            async with emitter:
                await emitter.flush()
        else:
            with pytest.raises(ConnectError, match="within 10 s"):
                async with emitter:
                    pass


@pytest.mark.virtual_time
async def test_flush_measures_the_round_trip_with_a_precise_clock(anyio_backend: object) -> None:
    # The clock of the event loop stands still, as uvloop's does during a short round trip.
    async with (
        memory_peer(Peer.serve) as connectable,
        connect_once(connectable=connectable) as emitter,
    ):
        start = anyio.current_time()
        assert await emitter.flush() > 0
        assert anyio.current_time() == start


@pytest.mark.virtual_time
async def test_connect_without_timeout_waits_until_cancelled(anyio_backend: object) -> None:
    async with memory_peer(ignore) as connectable:
        start = anyio.current_time()
        with anyio.move_on_after(86400) as scope:
            async with connect_once(connectable=connectable, connect_timeout=None):
                pass
        assert scope.cancelled_caught
        assert anyio.current_time() - start == pytest.approx(86400)
    assert connectable.streams[0].closed


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_connack_in_single_bytes_is_accepted(anyio_backend: object, transport: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        for number in range(4):
            await peer.send(packets.CONNACK[number : number + 1])
            await anyio.wait_all_tasks_blocked()
        await peer.answer_all()

    async with serving(transport, script) as options, connect_once(**options) as emitter:
        await emitter.flush()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_peer_that_closes_before_connack_raises_connect_error(
    anyio_backend: object, transport: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(packets.CONNACK[:2])

    async with serving(transport, script) as options:
        with pytest.raises(ConnectError, match=r"closed.*CONNECT"):
            async with connect_once(**options):
                pass


async def test_peer_that_resets_before_connack_raises_connect_error(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        peer.reset()

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectError, match="reset"):
            async with connect_once(f"mqtt://127.0.0.1:{port}"):
                pass


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100), "CONNECT"),
        (packets.PINGRESP, "CONNECT"),
        (packets.publish("a/", b"early"), "CONNECT"),
        (bytes((0x20, 3, 0, 0, 0)), "CONNACK of 3 bytes"),
        (bytes((0x20, 0xFF, 0xFF, 0xFF, 0xFF)), "four bytes"),
        (bytes((0x20, 0xFF, 0xFF, 0x7F)), "max_message_size"),
    ],
)
async def test_other_first_packet_raises_connect_error(
    anyio_backend: object, garbage: bytes, words: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(garbage)
        await peer.packet()

    async with memory_peer(script) as connectable:
        with pytest.raises(ConnectError, match=words) as caught:
            async with connect_once(connectable=connectable):
                pass
    assert isinstance(caught.value.__cause__, RemoteProtocolError)
    assert connectable.streams[0].closed


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 255])
async def test_connack_with_refusal_raises_connect_refused_error(
    anyio_backend: object, code: int
) -> None:
    # After code 1 and 2, Paho by itself would reconnect immediately and block until it has.
    clients = []

    async def script(peer: Peer) -> None:
        clients.append(peer)
        await peer.accept(code)
        assert await peer.packet() is None

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectRefusedError, match=f"mqtt://127.0.0.1:{port}") as caught:
            async with connect_once(f"mqtt://127.0.0.1:{port}"):
                pass
    assert caught.value.code == code
    assert len(clients) == 1
    if code > 5:
        assert f"code {code}" in str(caught.value)


async def test_servers_are_tried_in_order(anyio_backend: object) -> None:
    contacted = []

    async def unavailable(peer: Peer) -> None:
        contacted.append("unavailable")
        await peer.accept(3)

    async def closes(peer: Peer) -> None:
        contacted.append("closes")

    async def works(peer: Peer) -> None:
        contacted.append("works")
        await peer.serve()

    async def never(peer: Peer) -> None:
        raise AssertionError("the third server was usable")

    async with (
        tcp_peer(unavailable) as first,
        tcp_peer(closes) as second,
        tcp_peer(works) as third,
        tcp_peer(never) as fourth,
    ):
        servers = [f"mqtt://127.0.0.1:{port}" for port in (first, second, third, fourth)]
        async with connect_once(servers=servers) as emitter:
            assert emitter.connection is not None
            assert emitter.connection.server == servers[2]
    assert contacted == ["unavailable", "closes", "works"]


@pytest.mark.parametrize("refuses_last", [False, True])
async def test_connect_error_has_cause_for_each_server(
    anyio_backend: object, refuses_last: bool
) -> None:
    async def unavailable(peer: Peer) -> None:
        await peer.accept(3)

    async def closes(peer: Peer) -> None:
        await peer.packet()

    async with tcp_peer(unavailable) as refusing, tcp_peer(closes) as closing:
        ports = (closing, refusing) if refuses_last else (refusing, closing)
        servers = [f"mqtt://127.0.0.1:{port}" for port in ports]
        with pytest.raises(ConnectError) as caught:
            async with connect_once(servers=servers):
                pass
    error = caught.value
    assert list(error.causes) == servers
    assert {type(cause) for cause in error.causes.values()} == {ConnectRefusedError, EOFError}
    assert error.__cause__ is error.causes[servers[-1]]
    assert all(server in str(error) for server in servers)
    assert "unavailable" in str(error)
    assert isinstance(error, ConnectRefusedError) is refuses_last
    if isinstance(error, ConnectRefusedError):
        assert error.code == 3


async def test_connect_packet_has_all_options(anyio_backend: object) -> None:
    bodies = []

    async def script(peer: Peer) -> None:
        bodies.append((await peer.accept()).body)
        await peer.rest()

    async with memory_peer(script) as connectable:
        will = Will("key", "a/b", "gone", retain=True)
        async with connect_once(
            connectable=connectable,
            client_id="me",
            username="ann",
            password="secret",
            will=will,
            keepalive=2.6,
        ):
            pass
        async with connect_once(connectable=connectable, keepalive=1.2):
            pass
    fields = [b"me", b"key/a/b/", b"gone", b"ann", b"secret"]
    # Flags for user name, password, retained will and clean session; keepalive in whole seconds.
    head = b"\x00\x04MQTT\x04" + bytes((0b11100110, 0, 3))
    assert bodies[0] == head + b"".join(packets.uint16(len(field)) + field for field in fields)
    assert bodies[1] == b"\x00\x04MQTT\x04" + bytes((0b10, 0, 1)) + bytes(2)


async def test_connect_packet_larger_than_capacity_is_sent(anyio_backend: object) -> None:
    bodies = []

    async def script(peer: Peer) -> None:
        bodies.append((await peer.accept()).body)
        await peer.rest()

    async with memory_peer(script, capacity=10) as connectable:
        async with connect_once(connectable=connectable, client_id="x" * 1000):
            pass
    assert bodies[0].endswith(b"x" * 1000)


async def test_connect_error_shows_no_secret(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept(4)

    async with tcp_peer(script) as port:
        emitter = connect_once(f"mqtt://ann:secret@127.0.0.1:{port}", will=Will("k3y", "a/", "w"))
        with pytest.raises(ConnectRefusedError, match=r"user ?name or password") as caught:
            async with emitter:
                pass
    shown = f"{caught.value!r} {caught.value.causes!r} {emitter!r}"
    assert "secret" not in shown
    assert "k3y" not in shown


# Receiving


def answer_connect_with(data: bytes) -> Callable[[Peer], Awaitable[None]]:
    """Return a script that answers CONNECT with these bytes and sends nothing else."""

    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(data)
        await peer.rest()

    return script


async def test_messages_received_with_connack_are_delivered(anyio_backend: object) -> None:
    messages = b"".join(packets.publish("a/", b"%d" % number) for number in range(5))
    received: list[bytes] = []
    async with memory_peer(answer_connect_with(packets.CONNACK + messages)) as connectable:
        emitter = connect_once(connectable=connectable)
        emitter.on("message", lambda message: received.append(message.binary))
        async with emitter:
            await anyio.wait_all_tasks_blocked()
    assert received == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("garbage_after", [b"\x00\x00", packets.CONNACK])
async def test_malformed_packet_after_connack_ends_connection(
    anyio_backend: object, garbage_after: bytes
) -> None:
    async with memory_peer(answer_connect_with(packets.CONNACK + garbage_after)) as connectable:
        with pytest.raises(ConnectionLostError) as caught:
            async with connect_once(connectable=connectable):
                await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, RemoteProtocolError)


async def test_calls_resumed_by_pubacks_of_one_chunk_are_sent_together(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    try_send = SocketTransport.try_send

    def recording_try_send(transport: SocketTransport, data: bytes | memoryview) -> int:
        sizes.append(len(data))
        return try_send(transport, data)

    async def script(peer: Peer) -> None:
        await peer.accept()
        first = [await peer.until(PUBLISH) for _ in range(3)]
        sizes.clear()
        await peer.send(b"".join(packets.puback(packet.packet_id) for packet in first))
        for _ in range(3):
            await peer.answer(await peer.until(PUBLISH))
        await peer.answer_all()

    async def twice(emitter: Emitter) -> None:
        for _ in range(2):
            await emitter.publish("k", "a/", b"x", qos=1)

    monkeypatch.setattr(SocketTransport, "try_send", recording_try_send)
    async with serving("unix", script) as options, connect_once(**options) as emitter:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(twice, emitter)
        assert sizes[0] == 3 * len(packets.publish("k/a/", b"x", 1))


async def test_chunk_of_many_messages_is_delivered_whole(anyio_backend: object) -> None:
    # Paho's loop_read() reads one packet per call, however much is available.
    received: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(b"".join(packets.publish("a/", b"%d" % n) for n in range(500)))
        await peer.until(PINGREQ)
        await peer.send(packets.PINGRESP)
        await peer.rest()

    async with tcp_peer(script) as port:
        emitter = connect_once(f"mqtt://127.0.0.1:{port}")
        emitter.on("message", lambda message: received.append(message.binary))
        async with emitter:
            await emitter.flush()
    assert received == [b"%d" % n for n in range(500)]


@pytest.mark.parametrize("together", [False, True])
async def test_message_of_qos_1_is_acknowledged(anyio_backend: object, together: bool) -> None:
    received = []

    async def script(peer: Peer) -> None:
        await peer.packet()
        message = packets.publish("a/", b"x", packet_id=7)
        if together:
            await peer.send(packets.CONNACK + message)
        else:
            await peer.send(packets.CONNACK)
            await anyio.wait_all_tasks_blocked()
            await peer.send(message)
        received.append(await peer.packet())
        answered.set()
        await peer.rest()

    answered = anyio.Event()
    async with memory_peer(script) as connectable:
        emitter = connect_once(connectable=connectable)
        emitter.on("message", lambda message: None)
        async with emitter:
            await answered.wait()
    assert received == [Packet(4, 0, packets.uint16(7))]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_messages_before_end_of_connection_are_delivered(
    anyio_backend: object, transport: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(b"".join(packets.publish("a/", b"%d" % n) for n in range(3)))

    received = []
    async with serving(transport, script) as options:
        with pytest.raises(ConnectionLostError, match="closed") as caught:
            emitter = connect_once(**options)
            emitter.on("message", lambda message: received.append(message.binary))
            async with emitter:
                await anyio.sleep_forever()
    assert received == [b"0", b"1", b"2"]
    assert isinstance(caught.value.__cause__, EOFError)


@pytest.mark.parametrize("transport", ["tcp", "unix", "memory"])
async def test_half_closed_connection_is_lost(anyio_backend: object, transport: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.stream.send_eof()
        # The client closes its side too, and sends nothing before.
        assert await peer.rest() == []

    async with serving(transport, script) as options:
        with pytest.raises(ConnectionLostError, match="closed"):
            async with connect_once(**options):
                await anyio.sleep_forever()


async def test_reset_connection_is_lost(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(PINGREQ)
        peer.reset()

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectionLostError, match="reset") as caught:
            async with connect_once(f"mqtt://127.0.0.1:{port}") as emitter:
                with pytest.raises(ConnectionLostError, match="reset"):
                    await emitter.flush()
                await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, ConnectionResetError)


# Several connections of one client


async def test_packets_of_old_connection_are_not_sent_on_new_one(anyio_backend: object) -> None:
    # Paho by itself would send unacknowledged publishes, and those made while offline, on the next
    # connection.
    connections: list[list[Packet]] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        if not connections:
            connections.append([await peer.until(PUBLISH)])
        else:
            connections.append(await peer.rest())

    async with tcp_peer(script) as port:
        emitter = connect_once(f"mqtt://127.0.0.1:{port}")
        with pytest.raises(ConnectionLostError):
            async with emitter:
                await emitter.publish("k", "a/", "never acknowledged", qos=1)
        with pytest.raises(ConnectionLostError):
            await emitter.publish("k", "a/", "offline", qos=1)
        async with emitter:
            pass
    assert connections[0][0].payload == b"never acknowledged"
    assert [packet.kind for packet in connections[1]] == [DISCONNECT]


async def test_packet_id_is_not_reused_before_its_acknowledgement(
    anyio_backend: object,
) -> None:
    ids = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        unacknowledged = (await peer.until(PUBLISH)).packet_id
        for _ in range(3):
            packet = await peer.until(PUBLISH)
            ids.append(packet.packet_id)
            await peer.answer(packet)
        # The late PUBACK must not acknowledge another publish.
        await peer.send(packets.puback(unacknowledged))
        ids.append(unacknowledged)
        await peer.rest()

    async with tcp_peer(script) as port, connect_once(f"mqtt://127.0.0.1:{port}") as emitter:
        statistics = emitter.statistics
        with anyio.CancelScope() as scope:

            async def give_up() -> None:
                while not statistics().pending:
                    await checkpoint()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_up)
                await emitter.publish("k", "a/", "given up", qos=1)
        assert statistics().pending == 1
        for number in range(3):
            await emitter.publish("k", "a/", str(number), qos=1)
        while statistics().pending:
            await checkpoint()
    assert len(set(ids)) == 4


# Closing


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_queued_packets_are_sent_before_disconnect(
    anyio_backend: object, transport: str
) -> None:
    received: list[Packet] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        received.extend(await peer.rest())

    async with serving(transport, script) as options:
        async with connect_once(**options) as emitter:
            for number in range(40):
                await emitter.publish("k", "a/", b"%02d" % number + bytes(30_000))
    assert [packet.kind for packet in received] == [PUBLISH] * 40 + [DISCONNECT]
    assert [packet.payload[:2] for packet in received[:-1]] == [b"%02d" % n for n in range(40)]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_messages_received_while_closing_do_not_discard_sent_packets(
    anyio_backend: object, transport: str
) -> None:
    # A closed socket answers received bytes with a reset, and the reset discards what the broker
    # has not read yet.
    closing = anyio.Event()
    received: list[Packet] = []
    count = 20 if transport == "memory" else 100

    async def script(peer: Peer) -> None:
        await peer.accept()
        await closing.wait()
        for _ in range(10):
            await peer.send(packets.publish("a/", b"while closing"))
            await checkpoint()
        received.extend(await peer.rest())

    async def watch(emitter: Emitter) -> None:
        while emitter.state == "connected" or emitter.statistics().queued_bytes:
            await checkpoint()
        closing.set()

    async with serving(transport, script) as options, anyio.create_task_group() as tasks:
        emitter = connect_once(**options)
        emitter.on("message", lambda message: None)
        async with emitter:
            # As much as fits into the system's buffers while the peer reads nothing.
            for _ in range(count):
                await emitter.publish("k", "a/", bytes(2000))
            tasks.start_soon(watch, emitter)
    assert [packet.kind for packet in received] == [PUBLISH] * count + [DISCONNECT]


@pytest.mark.virtual_time
async def test_nothing_is_sent_after_disconnect(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"x", packet_id=1))
        await peer.until(DISCONNECT)
        # Unlike a real broker, send more and do not close the connection.
        await peer.send(packets.publish("a/", b"x", packet_id=2))
        assert await peer.packet() is None
        assert not peer.unparsed
        await anyio.sleep(100)

    refused = []

    async def publish(emitter: Emitter) -> None:
        for _ in range(14):
            await anyio.sleep(0.1)
            with pytest.raises(anyio.ClosedResourceError):
                await emitter.publish("k", "a/", "too late")
            refused.append(emitter.state)
            # A packet given directly to the connection is dropped too.
            assert emitter._slot.connection is not None
            emitter._slot.connection.send(Publish(b"k/a/", b"too late"))

    async with memory_peer(script) as connectable, anyio.create_task_group() as tasks:
        start = anyio.current_time()
        emitter = connect_once(connectable=connectable, keepalive=1, disconnect_timeout=5)
        emitter.on("message", lambda message: None)
        async with emitter:
            await emitter.publish("k", "a/", "x")
            tasks.start_soon(publish, emitter)
        # The ping timeout ends the wait for the peer, without an error because all was sent.
        assert anyio.current_time() - start == pytest.approx(1.5)
    assert refused == ["closing"] * 14
    assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_no_puback_is_sent_after_disconnect(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(1)
        # DISCONNECT is queued, but not sent because the connection's buffer is full.
        await peer.send(packets.publish("a/", b"x", packet_id=1))
        await anyio.sleep(1)
        kinds.extend(packet.kind for packet in await peer.rest())
        assert await peer.packet() is None

    kinds: list[int] = []
    async with memory_peer(script, capacity=100) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            await emitter.publish("k", "a/", bytes(1000))
    assert kinds == [PUBLISH, DISCONNECT]


async def test_connection_closed_before_run_sends_disconnect(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.rest()
        kinds.extend(packet.kind for packet in peer.received)

    async def deliver(events: Sequence[Event]) -> None:
        raise AssertionError("the connection started to read")

    kinds: list[int] = []
    async with tcp_peer(script) as port:
        options, tasks = make_options(f"mqtt://127.0.0.1:{port}", {}), Tasks(print)
        connection = await open_connection(options, Wants("emitter"), tasks)
        connection.close()
        assert await connection.run(deliver, tasks) is None
    assert kinds == [CONNECT, DISCONNECT]


@pytest.mark.virtual_time
async def test_paused_reading_does_not_delay_disconnect(
    anyio_backend: object,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        # One chunk, of which most is not yet delivered when the client disconnects.
        await peer.send(packets.publish("a/", b"x") * 5)
        await peer.rest()

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
        async with emitter.stream("message", buffer=1, overflow="block") as messages:
            await anyio.wait_all_tasks_blocked()
            await emitter.publish("k", "a/", "x")
            start = anyio.current_time()
            await emitter.disconnect()
            assert anyio.current_time() == start
            assert messages.statistics().current_buffer_used == 1


@pytest.mark.parametrize("transport", ["tcp", "memory"])
async def test_connection_that_breaks_while_reading_is_paused_is_lost(
    anyio_backend: object, transport: str
) -> None:
    peer_closed = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"x") * 5)
        await peer_closed.wait()

    async with serving(transport, script) as options:
        emitter = connect_once(**options)
        with pytest.raises(ConnectionLostError) as caught:
            async with emitter, emitter.stream("message", buffer=1, overflow="block"):
                connection = emitter._slot.connection
                assert connection is not None
                while not connection._reading_paused:
                    await checkpoint()
                peer_closed.set()
                while True:
                    # Reading is paused, so only a failed send detects the loss.
                    await emitter.publish("k", "a/", "x")
                    await checkpoint()
    assert [message.asString() for message in caught.value.unread] == ["x"]


@pytest.mark.parametrize("overflow", ["drop_oldest", "raise"])
@pytest.mark.parametrize("transport", ["tcp", "memory"])
async def test_busy_consumer_does_not_delay_disconnect(
    anyio_backend: object, transport: str, overflow: Any
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"x") * 2000)
        await peer.rest()

    received = 0

    async def take(messages: EventStream[EmitterMessage]) -> None:
        nonlocal received
        while True:
            try:
                await messages.receive()
            except SlowConsumerError:
                continue
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                return
            received += 1
            # Be busy: the reader yields to this task each time.
            for _ in range(3):
                await checkpoint()

    async with (
        serving(transport, script) as options,
        anyio.create_task_group() as tasks,
        connect_once(**options) as emitter,
        emitter.stream("message", buffer=1, overflow=overflow) as messages,
    ):
        tasks.start_soon(take, messages)
        while received < 5:
            await checkpoint()
        before = received
        await emitter.disconnect()
        assert received - before < 50


async def test_broker_may_close_before_send_of_disconnect_returns(anyio_backend: object) -> None:
    # The broker reads DISCONNECT and closes before the stream's send() returns.
    class Slow(MemoryStream):
        async def send(self, item: bytes) -> None:
            await super().send(item)
            if item.endswith(b"\xe0\x00"):
                await anyio.sleep_forever()

    async with memory_peer(serve, kind=Slow) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            await emitter.publish("k", "a/", "x")


class SendGuardStream(MemoryStream):
    """Records whether it is closed while it sends, which raised an error in some AnyIO versions."""

    sending = False
    closed_while_sending = False

    async def send(self, item: bytes) -> None:
        self.sending = True
        try:
            await super().send(item)
        finally:
            self.sending = False

    async def aclose(self) -> None:
        SendGuardStream.closed_while_sending |= self.sending
        await super().aclose()


@pytest.mark.virtual_time
@pytest.mark.parametrize("leave", ["left", "cancelled", "broken"])
async def test_stream_is_not_closed_while_it_sends(anyio_backend: object, leave: str) -> None:
    blocked = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await blocked.wait()
        if leave == "broken":
            # Send an invalid packet, and still do not read.
            await peer.send(b"\xf0\x00")
        await anyio.sleep(100)

    SendGuardStream.closed_while_sending = False
    async with memory_peer(script, capacity=100, kind=SendGuardStream) as connectable:
        with anyio.CancelScope() as scope, suppress(ConnectionLostError):
            async with connect_once(connectable=connectable) as emitter:
                await emitter.publish("k", "a/", bytes(1000))
                await anyio.wait_all_tasks_blocked()
                blocked.set()
                if leave == "cancelled":
                    scope.cancel()
                elif leave == "broken":
                    await anyio.sleep_forever()
    assert connectable.streams[0].closed
    assert not SendGuardStream.closed_while_sending


async def test_error_of_stream_aclose_is_ignored(anyio_backend: object) -> None:
    class Failing(MemoryStream):
        async def aclose(self) -> None:
            with anyio.CancelScope(shield=True):
                await super().aclose()
            raise RuntimeError("close failed")

    async with memory_peer(serve, kind=Failing) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            await emitter.flush()
        assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_close_does_not_wait_for_peer_if_nothing_is_unread(
    anyio_backend: object,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        for _ in range(3):
            if packet := await peer.packet():
                await peer.answer(packet)
        assert [packet.kind for packet in peer.received[1:]] == [PUBLISH, PINGREQ, DISCONNECT]
        await anyio.sleep(100)

    async with memory_peer(script) as connectable:
        start = anyio.current_time()
        async with connect_once(connectable=connectable) as emitter:
            await emitter.publish("k", "a/", "x")
            await emitter.flush()
        assert anyio.current_time() == start
        assert connectable.streams[0].closed


@pytest.mark.parametrize("transport", ["tcp", "unix", "memory"])
async def test_client_closes_its_sending_side_after_disconnect(
    anyio_backend: object, transport: str
) -> None:
    # A peer that does not know DISCONNECT, such as a proxy, closes its side because of the EOF.
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(DISCONNECT)
        assert await peer.packet() is None
        await peer.send(packets.publish("a/", b"still accepted"))
        closes.append(emitter.state)

    closes: list[str] = []
    async with serving(transport, script) as options:
        emitter = connect_once(**options)
        async with emitter:
            await emitter.publish("k", "a/", "x")
    assert closes == ["closing"]


@pytest.mark.virtual_time
@pytest.mark.parametrize("reads", [False, True])
async def test_close_takes_at_most_disconnect_timeout(anyio_backend: object, reads: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        if reads:
            await peer.until(DISCONNECT)
        await anyio.sleep(100)

    async with memory_peer(script, capacity=100) as connectable:
        async with connect_once(connectable=connectable, disconnect_timeout=3) as emitter:
            await emitter.publish("k", "a/", bytes(50_000))
            start = anyio.current_time()
        assert anyio.current_time() - start == pytest.approx(3)
        assert connectable.streams[0].closed


@pytest.mark.virtual_time
@pytest.mark.parametrize("capacity", [1, 100, 65536])
async def test_close_under_cancellation_does_not_wait(anyio_backend: object, capacity: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(100)

    async with memory_peer(script, capacity=capacity) as connectable:
        start = anyio.current_time()
        with anyio.CancelScope() as scope:
            async with connect_once(connectable=connectable) as emitter:
                await emitter.publish("k", "a/", bytes(50_000))
                scope.cancel()
                await checkpoint()
        assert anyio.current_time() == start
        assert connectable.streams[0].closed


@pytest.mark.parametrize("transport", ["tcp", "ws", "unix"])
@pytest.mark.parametrize("publishes", [0, 1, 3])
async def test_close_under_cancellation_sends_what_fits(
    anyio_backend: object, transport: str, publishes: int
) -> None:
    received: list[Packet] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        received.extend(await peer.rest())

    async with serving(transport, script) as options:
        with anyio.CancelScope() as scope:
            async with connect_once(**options) as emitter:
                await anyio.wait_all_tasks_blocked()
                for _ in range(publishes):
                    await emitter.publish("k", "a/", "x")
                scope.cancel()
                await checkpoint()
    assert [packet.kind for packet in received] == [PUBLISH] * publishes + [DISCONNECT]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_reset_after_disconnect_is_ignored(anyio_backend: object, transport: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(DISCONNECT)
        await peer.send(packets.publish("a/", b"too late"))
        if transport == "tcp":
            peer.reset()

    async with serving(transport, script) as options:
        for _ in range(5):
            async with connect_once(**options):
                pass


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_connection_that_breaks_before_disconnect_is_sent_is_lost(
    anyio_backend: object, transport: str
) -> None:
    closing = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await closing.wait()

    async def watch(emitter: Emitter) -> None:
        while emitter.state != "closing":
            await checkpoint()
        closing.set()

    async with serving(transport, script) as options, anyio.create_task_group() as tasks:
        with pytest.raises(ConnectionLostError):
            async with connect_once(**options) as emitter:
                # Fill the connection's buffers.
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as publishing:
                        publishing.start_soon(publish_endlessly, emitter)
                        while not await is_blocked(emitter):
                            pass
                        scope.cancel()
                tasks.start_soon(watch, emitter)


async def publish_endlessly(emitter: Emitter) -> None:
    while True:
        await emitter.publish("k", "a/", bytes(60_000))


async def is_blocked(emitter: Emitter) -> bool:
    """Return whether the queue is full and has not changed for 50 turns."""
    queued = emitter.statistics().queued_bytes
    for _ in range(50):
        await checkpoint()
        if emitter.statistics().queued_bytes != queued or queued < MAX_QUEUED_BYTES:
            return False
    return True


async def leave_normally(emitter: Emitter) -> None:
    await emitter.flush()


async def leave_by_disconnect(emitter: Emitter) -> None:
    await emitter.disconnect()


async def leave_by_exception(emitter: Emitter) -> None:
    raise KeyError("body")


async def leave_by_cancellation(emitter: Emitter) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await emitter.flush()
    raise KeyError("cancelled")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "leave", [leave_normally, leave_by_disconnect, leave_by_exception, leave_by_cancellation]
)
async def test_connection_is_closed_however_block_is_left(
    anyio_backend: object, transport: str, leave: Callable[[Emitter], Awaitable[None]]
) -> None:
    ended: list[Packet | None] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        while (packet := await peer.packet()) and packet.kind != DISCONNECT:
            with suppress(OSError, anyio.BrokenResourceError):
                await peer.answer(packet)
        ended.append(packet)
        # The client sends nothing more and closes.
        ended.append(await peer.packet())

    async with serving(transport, script) as options:
        initial_sockets = open_sockets()
        try:
            async with connect_once(**options) as emitter:
                await leave(emitter)
        except KeyError:
            pass
        while open_sockets() > initial_sockets:
            # The peer closes its socket after the client.
            await checkpoint()
        if transport == "memory":
            connectable: MemoryConnectable = options["connectable"]
            assert [stream.closed for stream in connectable.streams] == [True]
    assert ended == [Packet(DISCONNECT, 0, b""), None]


async def publish_and_leave(emitter: Emitter) -> None:
    async with emitter:
        for _ in range(3):
            await emitter.publish("k", "a/", bytes(10_000))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_leaving_client_cancelled_at_each_step_closes_it(
    anyio_backend: object, transport: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.rest()

    async with serving(transport, script) as options:
        initial_sockets = open_sockets()
        for style in all_cancel_styles():
            step, cancelled = 0, True
            while cancelled:
                emitter = connect_once(**options)
                cancelled = await cancel_at_step(publish_and_leave(emitter), step, style)
                assert emitter.state == "closed"
                step += 1
            assert step > 4
        while open_sockets() > initial_sockets:
            await checkpoint()


@pytest.mark.virtual_time
async def test_disconnect_in_turn_of_connack_closes_client(anyio_backend: object) -> None:
    async def run_client(emitter: Emitter) -> None:
        try:
            async with emitter:
                await anyio.sleep(1000)
        except anyio.ClosedResourceError:
            pass

    connectable = MemoryConnectable()
    emitter = connect_once(connectable=connectable)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_client, emitter)
        stream = await connectable.accept()
        await anyio.wait_all_tasks_blocked()
        start = anyio.current_time()
        stream.send_nowait(packets.CONNACK)
        await emitter.disconnect()
        assert emitter.state == "closed"
        assert anyio.current_time() - start < 100
        tasks.cancel_scope.cancel()
    connectable.close()


# Acknowledgements that the peer does not read


def qos_1(count: int) -> bytes:
    return packets.publish("a/", b"", 7) * count


async def test_queued_pubacks_to_peer_that_never_reads_are_bounded(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._net.connection._MAX_PACKET_IDS", 1000)
    max_queued = 0

    async def script(peer: Peer) -> None:
        nonlocal max_queued
        await peer.accept()
        with suppress(anyio.BrokenResourceError):
            while True:
                await peer.send(qos_1(100))
                await anyio.wait_all_tasks_blocked()
                max_queued = max(max_queued, emitter.statistics().queued_bytes)

    async with memory_peer(script, capacity=2000) as connectable:
        emitter = connect_once(connectable=connectable)
        with pytest.raises(
            ConnectionLostError, match="without reading their acknowledgements"
        ) as caught:
            async with emitter:
                await anyio.sleep_forever()
        assert isinstance(caught.value.__cause__, RemoteProtocolError)
    assert 0 < max_queued <= 4 * 1000 + 2000


async def test_pubacks_may_be_read_late(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._net.connection._MAX_PACKET_IDS", 1000)

    async def script(peer: Peer) -> None:
        await peer.accept()
        for _ in range(3):
            await peer.send(qos_1(900))
            await anyio.wait_all_tasks_blocked()
            for _ in range(900):
                await peer.packet()
        all_read.set()
        await peer.answer_all()

    all_read = anyio.Event()
    async with memory_peer(script, capacity=1000) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            await all_read.wait()
            await emitter.flush()
            assert emitter.statistics().received == 2700
