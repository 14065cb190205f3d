"""One link's life: what opens it, what it takes, and how it is left."""

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
from tests.support.leaks import open_sockets
from tests.support.links import one_link
from tests.support.memory import MemoryConnectable, MemoryStream
from tests.support.peer import (
    CONNECT,
    DISCONNECT,
    LINKS,
    PINGREQ,
    PUBLISH,
    Packet,
    Peer,
    memory_peer,
    serving,
    tcp_peer,
)
from tests.support.steps import all_styles, cancel_in_step


async def serve(peer: Peer) -> None:
    await peer.serve()


async def ignore(peer: Peer) -> None:
    """Take CONNECT and nothing else, and never say a word."""
    await peer.packet()
    while await peer.packet():
        pass


# From CONNECT to CONNACK


@pytest.mark.virtual_time
async def test_a_peer_that_never_speaks_is_given_up(anyio_backend: object) -> None:
    async with memory_peer(ignore) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectError, match="within 7 s") as caught:
            async with one_link(connectable=connectable, connect_timeout=7):
                pass
        assert anyio.current_time() - start == pytest.approx(7)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_a_peer_that_takes_nothing_is_given_up(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await anyio.sleep(100)

    async with memory_peer(script, capacity=5) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectError, match="within 7 s"):
            async with one_link(connectable=connectable, connect_timeout=7):
                pass
        assert anyio.current_time() - start == pytest.approx(7)


@pytest.mark.virtual_time
@pytest.mark.parametrize(("pause", "works"), [(1.9, True), (2.1, False)])
async def test_one_timeout_covers_everything(
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
        emitter = one_link(connectable=connectable, connect_timeout=10)
        if works:
            async with emitter:
                await emitter.flush()
        else:
            with pytest.raises(ConnectError, match="within 10 s"):
                async with emitter:
                    pass


@pytest.mark.virtual_time
async def test_without_a_timeout_the_caller_decides(anyio_backend: object) -> None:
    async with memory_peer(ignore) as connectable:
        start = anyio.current_time()
        with anyio.move_on_after(86400) as scope:
            async with one_link(connectable=connectable, connect_timeout=None):
                pass
        assert scope.cancelled_caught
        assert anyio.current_time() - start == pytest.approx(86400)
    assert connectable.streams[0].closed


@pytest.mark.parametrize("link", LINKS)
async def test_connack_may_come_in_pieces(anyio_backend: object, link: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        for number in range(4):
            await peer.send(packets.CONNACK[number : number + 1])
            await anyio.wait_all_tasks_blocked()
        await peer.answer_all()

    async with serving(link, script) as options, one_link(**options) as emitter:
        await emitter.flush()


@pytest.mark.parametrize("link", LINKS)
async def test_a_peer_that_closes_before_connack(anyio_backend: object, link: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(packets.CONNACK[:2])

    async with serving(link, script) as options:
        with pytest.raises(ConnectError, match=r"closed.*CONNECT"):
            async with one_link(**options):
                pass


async def test_a_peer_that_resets_the_link_before_connack(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        peer.reset()

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectError, match="reset"):
            async with one_link(f"mqtt://127.0.0.1:{port}"):
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
async def test_what_is_no_connack(anyio_backend: object, garbage: bytes, words: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(garbage)
        await peer.packet()

    async with memory_peer(script) as connectable:
        with pytest.raises(ConnectError, match=words) as caught:
            async with one_link(connectable=connectable):
                pass
    assert isinstance(caught.value.__cause__, RemoteProtocolError)
    assert connectable.streams[0].closed


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 255])
async def test_a_broker_that_refuses(anyio_backend: object, code: int) -> None:
    # For 1 and 2 Paho alone would connect again at once, and block until that is done.
    clients = []

    async def script(peer: Peer) -> None:
        clients.append(peer)
        await peer.accept(code)
        assert await peer.packet() is None

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectRefusedError, match=f"mqtt://127.0.0.1:{port}") as caught:
            async with one_link(f"mqtt://127.0.0.1:{port}"):
                pass
    assert caught.value.code == code
    assert len(clients) == 1
    if code > 5:
        assert f"code {code}" in str(caught.value)


async def test_servers_are_tried_in_turn(anyio_backend: object) -> None:
    asked = []

    async def unavailable(peer: Peer) -> None:
        asked.append("unavailable")
        await peer.accept(3)

    async def closes(peer: Peer) -> None:
        asked.append("closes")

    async def works(peer: Peer) -> None:
        asked.append("works")
        await peer.serve()

    async def never(peer: Peer) -> None:
        raise AssertionError("the one before has worked")

    async with (
        tcp_peer(unavailable) as first,
        tcp_peer(closes) as second,
        tcp_peer(works) as third,
        tcp_peer(never) as fourth,
    ):
        servers = [f"mqtt://127.0.0.1:{port}" for port in (first, second, third, fourth)]
        async with one_link(servers=servers) as emitter:
            assert emitter.connection is not None
            assert emitter.connection.server == servers[2]
    assert asked == ["unavailable", "closes", "works"]


@pytest.mark.parametrize("refuses_last", [False, True])
async def test_every_cause_is_told_by_server(anyio_backend: object, refuses_last: bool) -> None:
    async def unavailable(peer: Peer) -> None:
        await peer.accept(3)

    async def closes(peer: Peer) -> None:
        await peer.packet()

    async with tcp_peer(unavailable) as refusing, tcp_peer(closes) as closing:
        ports = (closing, refusing) if refuses_last else (refusing, closing)
        servers = [f"mqtt://127.0.0.1:{port}" for port in ports]
        with pytest.raises(ConnectError) as caught:
            async with one_link(servers=servers):
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


async def test_what_connect_says(anyio_backend: object) -> None:
    said = []

    async def script(peer: Peer) -> None:
        said.append((await peer.accept()).body)
        await peer.rest()

    async with memory_peer(script) as connectable:
        will = Will("key", "a/b", "gone", retain=True)
        async with one_link(
            connectable=connectable,
            client_id="me",
            username="ann",
            password="secret",
            will=will,
            keepalive=2.6,
        ):
            pass
        async with one_link(connectable=connectable, keepalive=1.2):
            pass
    fields = [b"me", b"key/a/b/", b"gone", b"ann", b"secret"]
    # User, password, will with retain, a clean session; then the keepalive in whole seconds.
    head = b"\x00\x04MQTT\x04" + bytes((0b11100110, 0, 3))
    assert said[0] == head + b"".join(packets.two(len(field)) + field for field in fields)
    assert said[1] == b"\x00\x04MQTT\x04" + bytes((0b10, 0, 1)) + bytes(2)


async def test_a_connect_larger_than_the_link_goes_in_pieces(anyio_backend: object) -> None:
    said = []

    async def script(peer: Peer) -> None:
        said.append((await peer.accept()).body)
        await peer.rest()

    async with memory_peer(script, capacity=10) as connectable:
        async with one_link(connectable=connectable, client_id="x" * 1000):
            pass
    assert said[0].endswith(b"x" * 1000)


async def test_no_secret_is_in_the_error(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept(4)

    async with tcp_peer(script) as port:
        emitter = one_link(f"mqtt://ann:secret@127.0.0.1:{port}", will=Will("k3y", "a/", "w"))
        with pytest.raises(ConnectRefusedError, match=r"user ?name or password") as caught:
            async with emitter:
                pass
    told = f"{caught.value!r} {caught.value.causes!r} {emitter!r}"
    assert "secret" not in told
    assert "k3y" not in told


# What comes in


def says(data: bytes) -> Callable[[Peer], Awaitable[None]]:
    """A peer that answers CONNECT with this and says no more."""

    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(data)
        await peer.rest()

    return script


async def test_messages_may_come_together_with_connack(anyio_backend: object) -> None:
    messages = b"".join(packets.publish("a/", b"%d" % number) for number in range(5))
    received: list[bytes] = []
    async with memory_peer(says(packets.CONNACK + messages)) as connectable:
        emitter = one_link(connectable=connectable)
        emitter.on("message", lambda message: received.append(message.binary))
        async with emitter:
            await anyio.wait_all_tasks_blocked()
    assert received == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("behind", [b"\x00\x00", packets.CONNACK])
async def test_nonsense_behind_connack_is_a_lost_link(anyio_backend: object, behind: bytes) -> None:
    async with memory_peer(says(packets.CONNACK + behind)) as connectable:
        with pytest.raises(ConnectionLostError) as caught:
            async with one_link(connectable=connectable):
                await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, RemoteProtocolError)


async def test_what_several_acknowledgements_let_go_on_leaves_together(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[int] = []
    try_send = SocketTransport.try_send

    def spy(transport: SocketTransport, data: bytes | memoryview) -> int:
        took.append(len(data))
        return try_send(transport, data)

    async def script(peer: Peer) -> None:
        await peer.accept()
        first = [await peer.until(PUBLISH) for _ in range(3)]
        took.clear()
        await peer.send(b"".join(packets.puback(one.packet_id) for one in first))
        for _ in range(3):
            await peer.answer(await peer.until(PUBLISH))
        await peer.answer_all()

    async def twice(emitter: Emitter) -> None:
        for _ in range(2):
            await emitter.publish("k", "a/", b"x", qos=1)

    monkeypatch.setattr(SocketTransport, "try_send", spy)
    async with serving("unix", script) as options, one_link(**options) as emitter:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(twice, emitter)
        assert took[0] == 3 * len(packets.publish("k/a/", b"x", 1))


async def test_a_chunk_of_many_messages_is_taken_whole(anyio_backend: object) -> None:
    # Paho's loop_read() takes one packet a call, however much there is to read.
    received: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(b"".join(packets.publish("a/", b"%d" % n) for n in range(500)))
        await peer.until(PINGREQ)
        await peer.send(packets.PINGRESP)
        await peer.rest()

    async with tcp_peer(script) as port:
        emitter = one_link(f"mqtt://127.0.0.1:{port}")
        emitter.on("message", lambda message: received.append(message.binary))
        async with emitter:
            await emitter.flush()
    assert received == [b"%d" % n for n in range(500)]


@pytest.mark.parametrize("together", [False, True])
async def test_a_message_of_qos_1_is_acknowledged(anyio_backend: object, together: bool) -> None:
    answers = []

    async def script(peer: Peer) -> None:
        await peer.packet()
        message = packets.publish("a/", b"x", packet_id=7)
        if together:
            await peer.send(packets.CONNACK + message)
        else:
            await peer.send(packets.CONNACK)
            await anyio.wait_all_tasks_blocked()
            await peer.send(message)
        answers.append(await peer.packet())
        answered.set()
        await peer.rest()

    answered = anyio.Event()
    async with memory_peer(script) as connectable:
        emitter = one_link(connectable=connectable)
        emitter.on("message", lambda message: None)
        async with emitter:
            await answered.wait()
    assert answers == [Packet(4, 0, packets.two(7))]


@pytest.mark.parametrize("link", LINKS)
async def test_what_came_before_the_end_of_the_link_is_delivered(
    anyio_backend: object, link: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(b"".join(packets.publish("a/", b"%d" % n) for n in range(3)))

    received = []
    async with serving(link, script) as options:
        with pytest.raises(ConnectionLostError, match="closed") as caught:
            emitter = one_link(**options)
            emitter.on("message", lambda message: received.append(message.binary))
            async with emitter:
                await anyio.sleep_forever()
    assert received == [b"0", b"1", b"2"]
    assert isinstance(caught.value.__cause__, EOFError)


@pytest.mark.parametrize("link", ["tcp", "unix", "memory"])
async def test_a_peer_that_closes_its_side_only(anyio_backend: object, link: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.stream.send_eof()
        # The client closes as well, and has nothing more to say.
        assert await peer.rest() == []

    async with serving(link, script) as options:
        with pytest.raises(ConnectionLostError, match="closed"):
            async with one_link(**options):
                await anyio.sleep_forever()


async def test_a_link_that_is_reset(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(PINGREQ)
        peer.reset()

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectionLostError, match="reset") as caught:
            async with one_link(f"mqtt://127.0.0.1:{port}") as emitter:
                with pytest.raises(ConnectionLostError, match="reset"):
                    await emitter.flush()
                await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, ConnectionResetError)


# One link after another


async def test_nothing_of_an_old_link_is_said_on_a_new_one(anyio_backend: object) -> None:
    # Paho alone would send publishes that were not acknowledged, and those made while it was
    # offline, again on the next link.
    links: list[list[Packet]] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        if not links:
            links.append([await peer.until(PUBLISH)])
        else:
            links.append(await peer.rest())

    async with tcp_peer(script) as port:
        emitter = one_link(f"mqtt://127.0.0.1:{port}")
        with pytest.raises(ConnectionLostError):
            async with emitter:
                await emitter.publish("k", "a/", "never acknowledged", qos=1)
        with pytest.raises(ConnectionLostError):
            await emitter.publish("k", "a/", "offline", qos=1)
        async with emitter:
            pass
    assert links[0][0].payload == b"never acknowledged"
    assert [packet.kind for packet in links[1]] == [DISCONNECT]


async def test_a_packet_id_that_waits_for_its_acknowledgement_is_not_used_again(
    anyio_backend: object,
) -> None:
    ids = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        withheld = (await peer.until(PUBLISH)).packet_id
        for _ in range(3):
            packet = await peer.until(PUBLISH)
            ids.append(packet.packet_id)
            await peer.answer(packet)
        # The late answer confirms nothing else.
        await peer.send(packets.puback(withheld))
        ids.append(withheld)
        await peer.rest()

    async with tcp_peer(script) as port, one_link(f"mqtt://127.0.0.1:{port}") as emitter:
        sent = emitter.statistics
        with anyio.CancelScope() as scope:

            async def give_up() -> None:
                while not sent().pending:
                    await checkpoint()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_up)
                await emitter.publish("k", "a/", "given up", qos=1)
        assert sent().pending == 1
        for number in range(3):
            await emitter.publish("k", "a/", str(number), qos=1)
        while sent().pending:
            await checkpoint()
    assert len(set(ids)) == 4


# Leaving


@pytest.mark.parametrize("link", LINKS)
async def test_all_that_was_queued_arrives_with_disconnect_behind_it(
    anyio_backend: object, link: str
) -> None:
    taken: list[Packet] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        taken.extend(await peer.rest())

    async with serving(link, script) as options:
        async with one_link(**options) as emitter:
            for number in range(40):
                await emitter.publish("k", "a/", b"%02d" % number + bytes(30_000))
    assert [packet.kind for packet in taken] == [PUBLISH] * 40 + [DISCONNECT]
    assert [packet.payload[:2] for packet in taken[:-1]] == [b"%02d" % n for n in range(40)]


@pytest.mark.parametrize("link", LINKS)
async def test_what_the_broker_says_meanwhile_costs_nothing_that_was_sent(
    anyio_backend: object, link: str
) -> None:
    # Bytes that reach a closed socket are answered with a reset, and that takes along what the
    # broker has not read yet.
    leaves = anyio.Event()
    taken: list[Packet] = []
    count = 20 if link == "memory" else 100

    async def script(peer: Peer) -> None:
        await peer.accept()
        await leaves.wait()
        for _ in range(10):
            await peer.send(packets.publish("a/", b"meanwhile"))
            await checkpoint()
        taken.extend(await peer.rest())

    async def watch(emitter: Emitter) -> None:
        while emitter.state == "connected" or emitter.statistics().queued_bytes:
            await checkpoint()
        leaves.set()

    async with serving(link, script) as options, anyio.create_task_group() as tasks:
        emitter = one_link(**options)
        emitter.on("message", lambda message: None)
        async with emitter:
            # As much as the system takes off our hands without the peer's reading any of it.
            for _ in range(count):
                await emitter.publish("k", "a/", bytes(2000))
            tasks.start_soon(watch, emitter)
    assert [packet.kind for packet in taken] == [PUBLISH] * count + [DISCONNECT]


@pytest.mark.virtual_time
async def test_nothing_goes_behind_disconnect(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"x", packet_id=1))
        await peer.until(DISCONNECT)
        # It says more, and does not close the link, as it should.
        await peer.send(packets.publish("a/", b"x", packet_id=2))
        assert await peer.packet() is None
        assert not peer.left
        await anyio.sleep(100)

    refused = []

    async def publish(emitter: Emitter) -> None:
        for _ in range(14):
            await anyio.sleep(0.1)
            with pytest.raises(anyio.ClosedResourceError):
                await emitter.publish("k", "a/", "too late")
            refused.append(emitter.state)
            # What is given back now has nothing to say, either.
            assert emitter._slot.connection is not None
            emitter._slot.connection.send(Publish(b"k/a/", b"too late"))

    async with memory_peer(script) as connectable, anyio.create_task_group() as tasks:
        start = anyio.current_time()
        emitter = one_link(connectable=connectable, keepalive=1, disconnect_timeout=5)
        emitter.on("message", lambda message: None)
        async with emitter:
            await emitter.publish("k", "a/", "x")
            tasks.start_soon(publish, emitter)
        # The peer is silent for so long that it counts as gone, and nobody minds any more.
        assert anyio.current_time() - start == pytest.approx(1.5)
    assert refused == ["closing"] * 14
    assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_no_acknowledgement_goes_behind_disconnect(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(1)
        # DISCONNECT is queued, but waits behind what the link does not take.
        await peer.send(packets.publish("a/", b"x", packet_id=1))
        await anyio.sleep(1)
        kinds.extend(packet.kind for packet in await peer.rest())
        assert await peer.packet() is None

    kinds: list[int] = []
    async with memory_peer(script, capacity=100) as connectable:
        async with one_link(connectable=connectable) as emitter:
            await emitter.publish("k", "a/", bytes(1000))
    assert kinds == [PUBLISH, DISCONNECT]


async def test_a_link_may_be_closed_before_it_has_begun(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.rest()
        kinds.extend(packet.kind for packet in peer.received)

    async def deliver(events: Sequence[Event]) -> None:
        raise AssertionError("it begins to read")

    kinds: list[int] = []
    async with tcp_peer(script) as port:
        link = await open_connection(make_options(f"mqtt://127.0.0.1:{port}", {}), Wants("emitter"))
        link.close()
        assert await link.run(deliver, Tasks(print)) is None
    assert kinds == [CONNECT, DISCONNECT]


@pytest.mark.virtual_time
async def test_a_consumer_that_holds_up_the_link_does_not_hold_the_goodbye(
    anyio_backend: object,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        # All in one chunk, of which most is still to be delivered when the link is left.
        await peer.send(packets.publish("a/", b"x") * 5)
        await peer.rest()

    async with memory_peer(script) as connectable, one_link(connectable=connectable) as emitter:
        async with emitter.stream("message", buffer=1, overflow="block") as messages:
            await anyio.wait_all_tasks_blocked()
            await emitter.publish("k", "a/", "x")
            start = anyio.current_time()
            await emitter.disconnect()
            assert anyio.current_time() == start
            assert messages.statistics().current_buffer_used == 1


@pytest.mark.parametrize("link", ["tcp", "memory"])
async def test_a_link_that_breaks_while_a_consumer_holds_it_up_ends(
    anyio_backend: object, link: str
) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"x") * 5)
        await gone.wait()

    async with serving(link, script) as options:
        emitter = one_link(**options)
        with pytest.raises(ConnectionLostError) as caught:
            async with emitter, emitter.stream("message", buffer=1, overflow="block"):
                connection = emitter._slot.connection
                assert connection is not None
                while not connection._reading_paused:
                    await checkpoint()
                gone.set()
                while True:
                    # Nobody reads that the peer has gone.
                    await emitter.publish("k", "a/", "x")
                    await checkpoint()
    assert [message.asString() for message in caught.value.unread] == ["x"]


@pytest.mark.parametrize("overflow", ["drop_oldest", "raise"])
@pytest.mark.parametrize("link", ["tcp", "memory"])
async def test_a_busy_consumer_of_the_rest_does_not_hold_the_end_either(
    anyio_backend: object, link: str, overflow: Any
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"x") * 2000)
        await peer.rest()

    taken = 0

    async def take(messages: EventStream[EmitterMessage]) -> None:
        nonlocal taken
        while True:
            try:
                await messages.receive()
            except SlowConsumerError:
                continue
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                return
            taken += 1
            # It does something else, and each time the link gives it its turn.
            for _ in range(3):
                await checkpoint()

    async with (
        serving(link, script) as options,
        anyio.create_task_group() as tasks,
        one_link(**options) as emitter,
        emitter.stream("message", buffer=1, overflow=overflow) as messages,
    ):
        tasks.start_soon(take, messages)
        while taken < 5:
            await checkpoint()
        before = taken
        await emitter.disconnect()
        assert taken - before < 50


async def test_a_broker_may_be_quicker_than_the_send(anyio_backend: object) -> None:
    # It has read DISCONNECT and closed before the stream has told us that it is sent.
    class Slow(MemoryStream):
        async def send(self, item: bytes) -> None:
            await super().send(item)
            if item.endswith(b"\xe0\x00"):
                await anyio.sleep_forever()

    async with memory_peer(serve, kind=Slow) as connectable:
        async with one_link(connectable=connectable) as emitter:
            await emitter.publish("k", "a/", "x")


class Guarded(MemoryStream):
    """Minds being closed while it sends, as those of AnyIO did."""

    busy = False
    minded = False

    async def send(self, item: bytes) -> None:
        self.busy = True
        try:
            await super().send(item)
        finally:
            self.busy = False

    async def aclose(self) -> None:
        Guarded.minded |= self.busy
        await super().aclose()


@pytest.mark.virtual_time
@pytest.mark.parametrize("way", ["left", "cancelled", "broken"])
async def test_a_stream_is_not_closed_while_it_sends(anyio_backend: object, way: str) -> None:
    stuck = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await stuck.wait()
        if way == "broken":
            # It says something that it may not, and still does not read.
            await peer.send(b"\xf0\x00")
        await anyio.sleep(100)

    Guarded.minded = False
    async with memory_peer(script, capacity=100, kind=Guarded) as connectable:
        with anyio.CancelScope() as scope, suppress(ConnectionLostError):
            async with one_link(connectable=connectable) as emitter:
                await emitter.publish("k", "a/", bytes(1000))
                await anyio.wait_all_tasks_blocked()
                stuck.set()
                if way == "cancelled":
                    scope.cancel()
                elif way == "broken":
                    await anyio.sleep_forever()
    assert connectable.streams[0].closed
    assert not Guarded.minded


async def test_a_stream_that_fails_to_close_is_as_good_as_closed(anyio_backend: object) -> None:
    class Failing(MemoryStream):
        async def aclose(self) -> None:
            with anyio.CancelScope(shield=True):
                await super().aclose()
            raise RuntimeError("it does not close")

    async with memory_peer(serve, kind=Failing) as connectable:
        async with one_link(connectable=connectable) as emitter:
            await emitter.flush()
        assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_who_has_lost_nothing_by_it_does_not_wait_for_the_peer(
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
        async with one_link(connectable=connectable) as emitter:
            await emitter.publish("k", "a/", "x")
            await emitter.flush()
        assert anyio.current_time() == start
        assert connectable.streams[0].closed


@pytest.mark.parametrize("link", ["tcp", "unix", "memory"])
async def test_the_peer_is_told_that_nothing_more_comes(anyio_backend: object, link: str) -> None:
    # One that does not know DISCONNECT, such as a proxy, closes its side all the same.
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(DISCONNECT)
        assert await peer.packet() is None
        await peer.send(packets.publish("a/", b"still taken"))
        closes.append(emitter.state)

    closes: list[str] = []
    async with serving(link, script) as options:
        emitter = one_link(**options)
        async with emitter:
            await emitter.publish("k", "a/", "x")
    assert closes == ["closing"]


@pytest.mark.virtual_time
@pytest.mark.parametrize("reads", [False, True])
async def test_a_peer_can_hold_the_goodbye_for_so_long_only(
    anyio_backend: object, reads: bool
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        if reads:
            await peer.until(DISCONNECT)
        await anyio.sleep(100)

    async with memory_peer(script, capacity=100) as connectable:
        async with one_link(connectable=connectable, disconnect_timeout=3) as emitter:
            await emitter.publish("k", "a/", bytes(50_000))
            start = anyio.current_time()
        assert anyio.current_time() - start == pytest.approx(3)
        assert connectable.streams[0].closed


@pytest.mark.virtual_time
@pytest.mark.parametrize("capacity", [1, 100, 65536])
async def test_under_cancellation_the_goodbye_is_at_once(
    anyio_backend: object, capacity: int
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(100)

    async with memory_peer(script, capacity=capacity) as connectable:
        start = anyio.current_time()
        with anyio.CancelScope() as scope:
            async with one_link(connectable=connectable) as emitter:
                await emitter.publish("k", "a/", bytes(50_000))
                scope.cancel()
                await checkpoint()
        assert anyio.current_time() == start
        assert connectable.streams[0].closed


@pytest.mark.parametrize("link", ["tcp", "ws", "unix"])
@pytest.mark.parametrize("publishes", [0, 1, 3])
async def test_under_cancellation_a_socket_still_takes_what_it_can(
    anyio_backend: object, link: str, publishes: int
) -> None:
    taken: list[Packet] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        taken.extend(await peer.rest())

    async with serving(link, script) as options:
        with anyio.CancelScope() as scope:
            async with one_link(**options) as emitter:
                await anyio.wait_all_tasks_blocked()
                for _ in range(publishes):
                    await emitter.publish("k", "a/", "x")
                scope.cancel()
                await checkpoint()
    assert [packet.kind for packet in taken] == [PUBLISH] * publishes + [DISCONNECT]


@pytest.mark.parametrize("link", LINKS)
async def test_how_the_link_ends_behind_disconnect_is_of_no_interest(
    anyio_backend: object, link: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(DISCONNECT)
        await peer.send(packets.publish("a/", b"too late"))
        if link == "tcp":
            peer.reset()

    async with serving(link, script) as options:
        for _ in range(5):
            async with one_link(**options):
                pass


@pytest.mark.parametrize("link", LINKS)
async def test_a_link_that_breaks_before_disconnect_has_left_is_lost(
    anyio_backend: object, link: str
) -> None:
    leaves = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await leaves.wait()

    async def watch(emitter: Emitter) -> None:
        while emitter.state != "closing":
            await checkpoint()
        leaves.set()

    async with serving(link, script) as options, anyio.create_task_group() as tasks:
        with pytest.raises(ConnectionLostError):
            async with one_link(**options) as emitter:
                # More than the link takes.
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as publishing:
                        publishing.start_soon(publish_endlessly, emitter)
                        while not await is_stuck(emitter):
                            pass
                        scope.cancel()
                tasks.start_soon(watch, emitter)


async def publish_endlessly(emitter: Emitter) -> None:
    while True:
        await emitter.publish("k", "a/", bytes(60_000))


async def is_stuck(emitter: Emitter) -> bool:
    """Tell whether the link has not moved for many turns."""
    waiting = emitter.statistics().queued_bytes
    for _ in range(50):
        await checkpoint()
        if emitter.statistics().queued_bytes != waiting or waiting < MAX_QUEUED_BYTES:
            return False
    return True


async def leave_normally(emitter: Emitter) -> None:
    await emitter.flush()


async def leave_by_disconnect(emitter: Emitter) -> None:
    await emitter.disconnect()


async def leave_by_an_exception(emitter: Emitter) -> None:
    raise KeyError("body")


async def leave_by_cancellation(emitter: Emitter) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await emitter.flush()
    raise KeyError("cancelled")


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(
    "way", [leave_normally, leave_by_disconnect, leave_by_an_exception, leave_by_cancellation]
)
async def test_the_link_is_closed_on_every_way_out(
    anyio_backend: object, link: str, way: Callable[[Emitter], Awaitable[None]]
) -> None:
    ended: list[Packet | None] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        while (packet := await peer.packet()) and packet.kind != DISCONNECT:
            with suppress(OSError, anyio.BrokenResourceError):
                await peer.answer(packet)
        ended.append(packet)
        # Nothing comes behind it, and the client closes.
        ended.append(await peer.packet())

    async with serving(link, script) as options:
        listening = open_sockets()
        try:
            async with one_link(**options) as emitter:
                await way(emitter)
        except KeyError:
            pass
        while open_sockets() > listening:
            # The peer has to see it first.
            await checkpoint()
        if link == "memory":
            connectable: MemoryConnectable = options["connectable"]
            assert [stream.closed for stream in connectable.streams] == [True]
    assert ended == [Packet(DISCONNECT, 0, b""), None]


async def publish_and_leave(emitter: Emitter) -> None:
    async with emitter:
        for _ in range(3):
            await emitter.publish("k", "a/", bytes(10_000))


@pytest.mark.parametrize("link", LINKS)
async def test_leaving_may_be_cancelled_at_every_point(anyio_backend: object, link: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.rest()

    async with serving(link, script) as options:
        listening = open_sockets()
        for style in all_styles():
            step, cancelled = 0, True
            while cancelled:
                emitter = one_link(**options)
                cancelled = await cancel_in_step(publish_and_leave(emitter), step, style)
                assert emitter.state == "closed"
                step += 1
            assert step > 4
        while open_sockets() > listening:
            await checkpoint()


@pytest.mark.virtual_time
async def test_disconnect_in_the_turn_of_connack_leaves(anyio_backend: object) -> None:
    async def live(emitter: Emitter) -> None:
        try:
            async with emitter:
                await anyio.sleep(1000)
        except anyio.ClosedResourceError:
            pass

    connectable = MemoryConnectable()
    emitter = one_link(connectable=connectable)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(live, emitter)
        stream = await connectable.accept()
        await anyio.wait_all_tasks_blocked()
        start = anyio.current_time()
        stream.send_nowait(packets.CONNACK)
        await emitter.disconnect()
        assert emitter.state == "closed"
        assert anyio.current_time() - start < 100
        tasks.cancel_scope.cancel()
    connectable.close()


# Acknowledgements that nobody reads


def qos_1(count: int) -> bytes:
    return packets.publish("a/", b"", 7) * count


async def test_acknowledgements_to_a_peer_that_never_reads_are_bounded(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._net.connection._MAX_PACKET_IDS", 1000)
    most = 0

    async def script(peer: Peer) -> None:
        nonlocal most
        await peer.accept()
        with suppress(anyio.BrokenResourceError):
            while True:
                await peer.send(qos_1(100))
                await anyio.wait_all_tasks_blocked()
                most = max(most, emitter.statistics().queued_bytes)

    async with memory_peer(script, capacity=2000) as connectable:
        emitter = one_link(connectable=connectable)
        with pytest.raises(
            ConnectionLostError, match="without reading their acknowledgements"
        ) as caught:
            async with emitter:
                await anyio.sleep_forever()
        assert isinstance(caught.value.__cause__, RemoteProtocolError)
    assert 0 < most <= 4 * 1000 + 2000


async def test_acknowledgements_may_be_read_late(
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
        async with one_link(connectable=connectable) as emitter:
            await all_read.wait()
            await emitter.flush()
            assert emitter.statistics().received == 2700
