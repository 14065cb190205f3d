"""End-to-end tests of the guarantees about buffers, order, missing replies and forged messages."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import Literal

import anyio
import pytest
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    NotFoundError,
    RemoteProtocolError,
    RequestError,
    RequestTimeoutError,
    SlowConsumerError,
    SubscriptionConflictError,
    UnauthorizedError,
    connect,
)
from emitter_anyio.testing import Broker
from tests.support import packets
from tests.support.connections import connect_once
from tests.support.leaks import client_tasks, running_tasks
from tests.support.logs import logged
from tests.support.peer import PUBLISH, SUBSCRIBE, UNSUBSCRIBE, Peer, memory_peer


async def publish_numbers(emitter: Emitter, key: str, channel: str, numbers: range) -> None:
    for number in numbers:
        await emitter.publish(key, channel, str(number))
    await emitter.flush()


def numbers_in(messages: list[EmitterMessage]) -> list[int]:
    return [int(message.binary) for message in messages]


# No data is lost silently


async def test_slow_consumer_error_comes_in_its_place_with_the_count(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url) as emitter:
        async with emitter.subscribe(key, "a/", buffer=3) as messages:
            await publish_numbers(emitter, key, "a/", range(10))
            read: list[EmitterMessage] = []
            with pytest.raises(SlowConsumerError, match="buffer") as caught:
                while True:
                    read.append(await messages.receive())
            assert caught.value.dropped == 7
            assert numbers_in(read) == [0, 1, 2]
            await publish_numbers(emitter, key, "a/", range(10, 12))
            assert numbers_in([await messages.receive() for _ in range(2)]) == [10, 11]
            assert messages.statistics().dropped == 7
        assert emitter.statistics().dropped == 7


@pytest.mark.parametrize(
    ("overflow", "kept"), [("drop_oldest", [7, 8, 9]), ("drop_newest", [0, 1, 2])]
)
async def test_overflow_policy_decides_which_messages_are_dropped(
    broker: Broker, overflow: Literal["drop_oldest", "drop_newest"], kept: list[int]
) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url) as emitter:
        async with emitter.subscribe(key, "a/", buffer=3, overflow=overflow) as messages:
            await publish_numbers(emitter, key, "a/", range(10))
            assert numbers_in([await messages.receive() for _ in range(3)]) == kept
            assert messages.statistics().dropped == 7


async def test_block_stops_reading_and_loses_nothing(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url) as publisher, connect(broker.url) as emitter:
        async with emitter.subscribe(key, "a/", buffer=2, overflow="block") as messages:
            await publish_numbers(publisher, key, "a/", range(50))
            await anyio.wait_all_tasks_blocked()
            assert messages.statistics().current_buffer_used == 2
            assert numbers_in([await messages.receive() for _ in range(50)]) == list(range(50))
            assert messages.statistics().dropped == 0


async def test_waiting_consumer_delays_neither_other_streams_nor_replies(broker: Broker) -> None:
    key = broker.keygen("a/#/")
    async with connect_once(broker.url) as emitter:
        async with (
            emitter.subscribe(key, "a/", buffer=1) as stalled,
            emitter.subscribe(key, "a/b/", buffer=1) as healthy,
        ):
            read: list[EmitterMessage] = []

            async def consume() -> None:
                async for message in healthy:
                    read.append(message)  # noqa: PERF401 - a cancelled comprehension would return nothing

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume)
                await publish_numbers(emitter, key, "a/b/", range(500))
                assert (await emitter.me()).id
                tasks.cancel_scope.cancel()
            assert numbers_in(read) == list(range(500))
            assert stalled.statistics().dropped == 499


async def test_busy_consumer_loses_nothing_in_a_flood(broker: Broker) -> None:
    key = broker.keygen("a/")
    count = 5000
    async with connect(broker.url) as publisher, connect(broker.url) as emitter:
        async with emitter.subscribe(key, "a/", buffer=8) as messages:
            read = 0

            async def consume() -> None:
                nonlocal read
                async for _ in messages:
                    read += 1
                    if read == count:
                        return

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume)
                await publish_numbers(publisher, key, "a/", range(count))
        assert read == count


async def test_replay_is_not_limited_by_the_buffer(broker: Broker) -> None:
    key = broker.keygen("a/", "rwsl")
    async with connect(broker.url) as emitter:
        for number in range(20):
            await emitter.publish(key, "a/", str(number), ttl=60)
        for _ in range(2):  # from the broker's own replay, and from a history request
            found: list[EmitterMessage] = []
            async with (
                emitter.subscribe(key, "a/", last=20, buffer=1) as first,
                emitter.subscribe(key, "a/", last=20, buffer=1) as second,
            ):
                for messages in (first, second):
                    found = [await messages.receive() for _ in range(20)]
                    assert sorted(numbers_in(found)) == list(range(20))
            # A replay from a history request is in order of time.
            assert numbers_in(found) == list(range(20))


async def test_overflow_of_a_handler_emits_error(broker: Broker) -> None:
    key = broker.keygen("a/")
    errors: list[Exception] = []
    release = anyio.Event()
    emitter = connect(broker.url)
    emitter.on("error", errors.append)

    async def wait(message: EmitterMessage) -> None:
        await release.wait()

    emitter.on("message", wait, buffer=2)
    async with emitter:
        await emitter.subscribe(key, "a/")
        await publish_numbers(emitter, key, "a/", range(10))
        release.set()
    (error,) = errors
    assert isinstance(error, SlowConsumerError)
    assert error.dropped == 7


async def test_unhandled_messages_are_counted_with_one_warning(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url) as emitter:
        await emitter.subscribe(key, "a/")
        await publish_numbers(emitter, key, "a/", range(5))
        assert emitter.statistics().unhandled == 5
        assert emitter.statistics().received == 5
    assert len([r for r in caplog.records if "unhandled" in r.getMessage()]) == 1


# Order


async def test_messages_arrive_in_the_order_of_the_calls(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
        async with anyio.create_task_group() as tasks:
            for number in range(0, 300, 3):
                await emitter.publish(key, "a/", str(number))
                await emitter.publish(key, "a/", str(number + 1))
                tasks.start_soon(publish_qos_1, emitter, key, str(number + 2))
                await checkpoint()
                await checkpoint()
        found = numbers_in([await messages.receive() for _ in range(300)])
    assert found == list(range(300))


async def publish_qos_1(emitter: Emitter, key: str, text: str) -> None:
    await emitter.publish(key, "a/", text, qos=1)


async def test_large_backlog_arrives_in_order(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url) as emitter:
        async with emitter.subscribe(key, "a/", overflow="block") as messages:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(publish_padded, emitter, key)
                found = [await messages.receive() for _ in range(200)]
    assert [int(message.binary.split()[0]) for message in found] == list(range(200))


async def publish_padded(emitter: Emitter, key: str) -> None:
    for number in range(200):
        await emitter.publish(key, "a/", b"%d " % number + bytes(4000))


# Missing replies


async def test_acknowledgement_without_a_reply_ends_the_request(broker: Broker) -> None:
    async with connect(broker.url) as emitter:
        with broker.lose("reply"), pytest.raises(RequestError, match="too large") as caught:
            await emitter.presence(broker.keygen("a/", "p"), "a/")
    assert caught.value.status is None
    assert caught.value.operation == "presence"


async def test_missing_reply_raises_request_timeout_error(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with connect_once(broker.url, request_timeout=0.01) as emitter:
        lost = broker.lose("puback", "reply", "suback", "unsuback")
        with lost, broker.hold("pingresp"):
            for call in (
                emitter.publish(key, "a/", "x", qos=1),
                emitter.me(),
                emitter.flush(),
                emitter.subscribe(key, "a/"),
                emitter.unsubscribe(key, "b/"),
                emitter.keygen(broker.secret_key, "a/", timeout=0.02),
            ):
                with pytest.raises(RequestTimeoutError, match=r" 0\.0[12] s") as caught:
                    await call
                assert isinstance(caught.value, TimeoutError)
                assert key not in str(caught.value)
        # The broker did subscribe, and the client unsubscribed after the timeout.
        await emitter.flush(timeout=None)
        (client,) = broker.clients
        assert not client.subscriptions


# System topics are not trusted


async def test_forged_replies_on_a_left_channel_are_not_delivered(broker: Broker) -> None:
    wide = broker.keygen("emitter/#/", "rw")
    errors: list[Exception] = []
    async with connect(broker.url) as forger, connect(broker.url) as victim:
        victim.on("error", errors.append)
        await victim.subscribe(wide, "emitter/keygen/")
        await victim.unsubscribe(wide, "emitter/keygen/")
        for payload in (b"\xff", b"[1]", b"7", b'{"req":1}', b"[" * 30000, b'{"req":"x"}'):
            await broker.publish("emitter/keygen/", payload)
            await forger.publish(wide, "emitter/keygen/", payload)
        await forger.flush()
        await victim.flush()
        assert victim.statistics().nonsense == 0


async def test_subscriber_of_system_channels_ignores_forged_replies(broker: Broker) -> None:
    wide = broker.keygen("emitter/#/", "rw")
    emitted: list[object] = []
    async with connect(broker.url) as victim:
        victim.on("keygen", emitted.append)
        async with victim.subscribe(wide, "emitter/keygen/") as messages:
            forged = b'{"req":%d,"status":200,"key":"forged","channel":"a/"}'
            for number in range(1, 20):
                await broker.publish("emitter/keygen/", forged % number)
            await victim.flush()
            # A message that answers no request is an ordinary one to a subscriber of that channel.
            assert messages.statistics().current_buffer_used == 19
            key = await victim.keygen(broker.secret_key, "a/")
            assert key.key != "forged"
            await victim.flush()
    assert len(emitted) == 1


async def test_refused_publish_with_qos_0_is_logged_with_advice(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    key = broker.keygen("a/", "r")
    async with connect(broker.url) as emitter:
        await emitter.publish(key, "a/", "x")
        with pytest.raises(UnauthorizedError, match="qos=1"):
            await emitter.flush()
        await emitter.flush()
    (record,) = logged(caplog, logging.WARNING)
    assert "qos=1" in record.getMessage()
    assert "flush()" in record.getMessage()
    assert key not in record.getMessage()


async def test_peer_that_violates_the_protocol_loses_the_connection(broker: Broker) -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:

        async def serve(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                await stream.receive()
                await stream.send(b"\x20\x02\x00\x00" + b"\x30\x01")
                await stream.send(b"\x00")
                with suppress(anyio.EndOfStream):
                    await stream.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve)
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            with pytest.raises(ConnectionLostError, match="the peer sent a") as caught:
                async with connect_once(host="127.0.0.1", port=port, secure=False):
                    await anyio.sleep_forever()
            tasks.cancel_scope.cancel()
    assert isinstance(caught.value.__cause__, RemoteProtocolError)


# Channels with equal hashes


async def test_channels_with_equal_hashes_conflict(broker: Broker) -> None:
    key = broker.keygen("#/", "rwp")
    async with connect(broker.url) as emitter:
        async with emitter.subscribe(key, "p/q/"):
            with pytest.raises(SubscriptionConflictError, match="second Emitter"):
                await emitter.subscribe(key, "q/p/")
        await emitter.subscribe(key, "q/p/")
        async with emitter.watch_presence(key, "p/q/"):
            with pytest.raises(SubscriptionConflictError, match="presence feed"):
                async with emitter.watch_presence(key, "q/p/"):
                    raise AssertionError("entered")
    async with connect(broker.url, allow_collisions=True) as emitter:
        async with emitter.subscribe(key, "p/q/"), emitter.subscribe(key, "q/p/") as messages:
            await emitter.publish(key, "q/p/", "x")
            assert (await messages.receive()).binary == b"x"


# Edge cases


async def test_more_channels_than_the_caches_hold(broker: Broker) -> None:
    key = broker.keygen("a/#/")
    async with (
        connect(broker.url) as emitter,
        emitter.subscribe(key, "a/", buffer=2000) as messages,
    ):
        for number in range(1100):
            await emitter.publish(key, f"a/{number}/", "x")
        await emitter.flush()
        assert [(await messages.receive()).channel for _ in range(1100)] == [
            f"a/{number}/" for number in range(1100)
        ]


async def test_unhashable_channel_raises_type_error(broker: Broker) -> None:
    async with connect(broker.url) as emitter:
        with pytest.raises(TypeError, match=r"channel.*str"):
            await emitter.publish(broker.keygen("a/"), ["a/"], "x")  # type: ignore[arg-type]  # on purpose


async def test_unsubscribe_does_not_end_a_stream(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
        await emitter.unsubscribe(key, "a/")
        await emitter.publish(key, "a/", "x")
        assert (await messages.receive()).binary == b"x"


async def test_refused_replay_unsubscribes(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        for _ in range(2):
            await peer.answer(await peer.until(SUBSCRIBE))
        request = await peer.until(PUBLISH)
        refusal = {"req": request.packet_id, "status": 404, "message": "not found"}
        await peer.send(packets.publish("emitter/history/", json.dumps(refusal).encode()))
        await peer.answer(request)
        left = await peer.until(UNSUBSCRIBE)
        assert left.body.endswith(b"/a/b/")
        await peer.answer(left)
        await peer.answer_all()

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
        async with emitter.subscribe("k", "a/", last=0):
            with pytest.raises(NotFoundError):
                async with emitter.subscribe("k", "a/b/", last=5):
                    raise AssertionError("entered")
            await emitter.flush()


async def test_feed_requests_nothing_after_disconnect(broker: Broker) -> None:
    before = running_tasks()
    async with connect(broker.url) as emitter:
        async with emitter.watch_presence(broker.keygen("a/", "p"), "a/", refresh=0.001) as feed:
            assert (await feed.receive()).event == "status"
            await emitter.disconnect()
            while client_tasks(before):
                await checkpoint()
            assert [event async for event in feed] == []


async def test_broker_with_the_mqtt_matcher(anyio_backend: object) -> None:
    async with Broker(matcher="mqtt") as broker, connect(broker.url, matcher="mqtt") as emitter:
        key = broker.keygen("a/#/")
        async with (
            emitter.subscribe(key, "a/+/") as plus,
            emitter.subscribe(key, "a/#/") as tail,
            emitter.subscribe(key, "a/") as exact,
            emitter.stream("message", channel="a/#/") as events,
            emitter.watch_presence(broker.keygen("a/#/", "p"), "a/#/") as feed,
        ):
            assert (await feed.receive()).event == "status"
            for channel in ("a/", "a/b/", "a/b/c/"):
                await emitter.publish(key, channel, channel, qos=1)
            for stream, channels in (
                (plus, ["a/b/"]),
                (tail, ["a/", "a/b/", "a/b/c/"]),
                (exact, ["a/"]),
                (events, ["a/", "a/b/", "a/b/c/"]),
            ):
                assert [(await stream.receive()).as_string() for _ in channels] == channels
                assert stream.statistics().current_buffer_used == 0


async def test_requests_reach_a_service_if_the_broker_matches_as_mqtt_does() -> None:
    async with Broker(matcher="mqtt") as broker, connect(broker.url, matcher="mqtt") as emitter:
        key = broker.keygen("#/", "rw")
        async with connect(broker.url, matcher="mqtt") as other, anyio.create_task_group() as tasks:

            async def serve(*, task_status: TaskStatus[None]) -> None:
                await other.serve(
                    key, "a/", EmitterMessage.as_string, group="g", task_status=task_status
                )

            await tasks.start(serve)
            assert (await emitter.request(key, "a/", "one")).as_string() == "one"
            async with emitter.request_many(key, "a/", "two", count=1) as replies:
                assert [reply.as_string() async for reply in replies] == ["two"]
            tasks.cancel_scope.cancel()
