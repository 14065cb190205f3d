"""Key functions: called once, and again after the broker refused the key that they returned."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import ConnectError, Emitter, NotFoundError, UnauthorizedError, Will, connect
from emitter_anyio.testing import Broker
from tests.client.tools import Calls, Keys, texts
from tests.support.connections import (
    QUICK_BACKOFF,
    connect_reconnecting,
    force_reconnect,
    while_disconnected,
)

EXPIRED = "A" * 32
LICENSE_WITH_EXPIRED_AS_A_SECRET = (
    "PewgNdBoivX6QbKD8uy1HbBsGF_EUUJj7tN2ZI9zT6Lawo8QI4ZoHIWDSnZA7oNs4B8gKJ_bhLIMiZbsxQgAAQ:3"
)
"""With this licence, ``EXPIRED`` decodes to a secret key of another contract, until 2066."""


def methods(emitter: Emitter, broker: Broker) -> Iterable[Callable[[Keys], Awaitable[object]]]:
    async def enter(keys: Keys) -> None:
        async with emitter.subscribe(keys, "a/"):
            pass

    async def resume(keys: Keys) -> None:
        async with emitter.subscribe(keys, "a/", resume=True):
            pass

    async def handle(keys: Keys) -> None:
        await emitter.subscribe(keys, "a/")
        await emitter.unsubscribe(keys, "a/")

    async def watch(keys: Keys) -> None:
        async with emitter.watch_presence(keys, "a/") as feed:
            assert (await feed.receive()).event == "status"

    async def read(keys: Keys) -> None:
        assert [message async for message in emitter.history(keys, "a/")] == []

    async def serve(keys: Keys) -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(emitter.serve, keys, "s/", lambda _: "yes")
            assert (await emitter.request(keys, "s/", "?")).binary == b"yes"
            tasks.cancel_scope.cancel()

    return [
        lambda keys: emitter.publish(keys, "a/", "x", qos=1),
        lambda keys: emitter.presence(keys, "a/"),
        lambda keys: emitter.presence(keys, "a/", changes=True),
        lambda keys: emitter.link(keys, "a/", "x", subscribe=True),
        enter,
        resume,
        handle,
        watch,
        read,
        serve,
    ]


# While connected


async def test_methods_call_a_key_function_once(broker: Broker, emitter: Emitter, key: str) -> None:
    keys = Keys(key)
    for method in methods(emitter, broker):
        await method(keys)
    assert keys.calls == 1


async def test_methods_call_a_key_function_again_after_a_refusal(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    for method in methods(emitter, broker):
        keys = Keys(EXPIRED, key)
        await method(keys)
        assert keys.calls == 2


async def test_methods_raise_if_the_key_function_returns_the_refused_key_again(
    broker: Broker, emitter: Emitter
) -> None:
    for method in methods(emitter, broker):
        keys = Keys(EXPIRED)
        with pytest.raises((UnauthorizedError, ExceptionGroup)):
            await method(keys)
        assert keys.calls == 2
        await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_secret_and_target_can_be_key_functions(broker: Broker, emitter: Emitter) -> None:
    secret = Keys(EXPIRED, broker.secret_key)
    target = Keys((await emitter.keygen(secret, "a/")).key)
    assert secret.calls == 2
    assert await emitter.keyban(secret, target)
    assert (secret.calls, target.calls) == (2, 1)


async def test_secret_of_an_unknown_contract_is_requested_again(anyio_backend: object) -> None:
    async with (
        Broker(license=LICENSE_WITH_EXPIRED_AS_A_SECRET) as broker,
        connect_reconnecting(broker.url) as emitter,
    ):
        with pytest.raises(NotFoundError):
            await emitter.keygen(EXPIRED, "a/")
        secret = Keys(EXPIRED, broker.secret_key)
        assert (await emitter.keygen(secret, "a/")).channel == "a/"
        assert secret.calls == 2


async def test_refused_publish_with_qos_0_makes_the_next_call_request_a_key(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    errors, calls = Calls(), Calls()
    emitter.on("error", errors)
    emitter.on("message", calls)
    await emitter.subscribe(key, "a/")
    keys = Keys(EXPIRED, key)
    await emitter.publish(keys, "a/", "refused")
    (error,) = await errors.get(1)
    assert isinstance(error, UnauthorizedError)
    await emitter.publish(keys, "a/", "taken")
    assert texts(await calls.get(1)) == ["taken"]
    assert keys.calls == 2


async def test_key_banned_later_is_requested_again(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    bad = broker.keygen("a/")
    keys = Keys(bad, key)
    await emitter.publish(keys, "a/", "x", qos=1)
    await emitter.keyban(broker.secret_key, bad)
    await emitter.publish(keys, "a/", "x", qos=1)
    assert keys.calls == 2


async def test_concurrent_subscribers_share_one_key_request(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    keys = Keys(EXPIRED, key)
    entered: list[int] = []
    leave = anyio.Event()

    async def subscribe(number: int) -> None:
        async with emitter.subscribe(keys, f"a/{number % 3}/"):
            entered.append(number)
            await leave.wait()

    async with anyio.create_task_group() as tasks:
        for number in range(30):
            tasks.start_soon(subscribe, number)
        while len(entered) < 30:
            await checkpoint()
        assert keys.calls == 2
        assert len(broker.clients[0].subscriptions) == 3
        leave.set()
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_exception_of_a_key_function_is_raised_by_the_method(
    emitter: Emitter, key: str
) -> None:
    keys = Keys(OSError("no token today"), key)
    with pytest.raises(OSError, match="no token today"):
        await emitter.publish(keys, "a/", "x")
    await emitter.publish(keys, "a/", "x", qos=1)


async def test_cancelled_key_function_is_called_by_the_next_waiter(
    emitter: Emitter, key: str
) -> None:
    calls = 0

    async def provide() -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            await anyio.sleep_forever()
        return key

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(emitter.publish, provide, "a/", "x")
                while not calls:
                    await checkpoint()
                tasks.start_soon(emitter.publish, provide, "a/", "x")
                for _ in range(5):
                    await checkpoint()
                scope.cancel()
    assert calls == 2


async def test_value_that_is_not_a_key_raises(emitter: Emitter) -> None:
    async def number() -> str:
        return 1  # type: ignore[return-value]  # the fault in question

    with pytest.raises(TypeError, match=r"str, a ChannelKey.*async"):
        await emitter.publish(5, "a/", "x")  # type: ignore[arg-type]  # the fault in question
    with pytest.raises(TypeError, match=r"str, a ChannelKey.*async"):
        emitter.history(None, "a/")  # type: ignore[arg-type]  # the fault in question
    with pytest.raises(TypeError, match="int"):
        await emitter.publish(number, "a/", "x")
    with pytest.raises(ValueError, match=r"key.*empty"):
        await emitter.publish(Keys(""), "a/", "x")


async def test_key_function_can_use_the_client(broker: Broker, emitter: Emitter) -> None:
    returned_keys = []

    async def provide() -> str:
        created = await emitter.keygen(broker.secret_key, "a/", "rw")
        returned_keys.append(created.key)
        return created.key

    async with emitter.subscribe(provide, "a/") as messages:
        for _ in range(2):
            await emitter.publish(provide, "a/", "x", qos=1)
            assert (await messages.receive()).binary == b"x"
            await emitter.keyban(broker.secret_key, returned_keys[-1])
            # Restoring calls it too, while all other calls wait.
            await force_reconnect(emitter, broker)
    assert len(returned_keys) == 3


async def test_refused_publish_with_link_requests_the_key_again(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, "a/")
    keys = Keys(EXPIRED, EXPIRED + "B", key)
    await emitter.link(keys, "a/", "x")
    assert keys.calls == 1
    with pytest.raises(UnauthorizedError):
        await emitter.publish_with_link("x", "refused twice", qos=1)
    await emitter.publish_with_link("x", "taken", qos=1)
    await emitter.publish_with_link("x", "too")
    assert texts(await calls.get(2)) == ["taken", "too"]
    assert keys.calls == 3


# On the next connection


async def test_keys_refused_while_restoring_are_requested_again(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    first = broker.keygen("#/", "rwlsp")
    keys = Keys(first, key)
    presences = Calls()
    emitter.on("presence", presences)
    async with (
        emitter.subscribe(keys, "a/", resume=True) as messages,
        emitter.subscribe(keys, "b/") as others,
        emitter.watch_presence(keys, "w/") as feed,
    ):
        await emitter.presence(keys, "p/", changes=True)
        await emitter.link(keys, "a/", "x")
        async with connect(broker.url, reconnect=QUICK_BACKOFF) as banning_client:
            await emitter.keyban(broker.secret_key, first)
            async with while_disconnected(emitter, broker):
                await broker.publish("a/", "stored", ttl=60)
            assert (await messages.receive()).replayed
            await emitter.publish_with_link("x", "live", qos=1)
            assert (await messages.receive()).binary == b"live"
            await broker.publish("b/", "too")
            assert (await others.receive()).binary == b"too"
            assert (await feed.receive()).event == "status"
            count = len(presences.values)
            await banning_client.subscribe(key, "w/")
            await banning_client.subscribe(key, "p/")
            await presences.get(count + 1)
            while not feed.members:
                await feed.receive()
        assert keys.calls == 2
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_stream_ends_if_the_key_function_returns_the_refused_key_again(
    broker: Broker, emitter: Emitter
) -> None:
    first = broker.keygen("a/")
    keys = Keys(first)
    async with emitter.subscribe(keys, "a/") as messages:
        await emitter.keyban(broker.secret_key, first)
        await force_reconnect(emitter, broker)
        with pytest.raises(UnauthorizedError):
            await messages.receive()
        assert keys.calls == 2


async def test_key_function_that_raises_while_restoring_ends_only_its_streams(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    first = broker.keygen("#/", "rp")
    keys = Keys(first, OSError("no token today"))
    async with (
        emitter.subscribe(keys, "a/") as messages,
        emitter.watch_presence(keys, "w/") as feed,
        emitter.subscribe(key, "b/") as others,
    ):
        assert (await feed.receive()).event == "status"
        await emitter.keyban(broker.secret_key, first)
        await force_reconnect(emitter, broker)
        for receive in (messages.receive, feed.receive):
            with pytest.raises(OSError, match="no token today"):
                await receive()
        await broker.publish("b/", "x")
        assert (await others.receive()).binary == b"x"


async def test_subscription_left_during_its_key_request_is_not_restored(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    first = broker.keygen("a/")
    requested, proceed, leave = anyio.Event(), anyio.Event(), anyio.Event()
    keys = [first]

    async def provide() -> str:
        if keys:
            return keys.pop()
        requested.set()
        await proceed.wait()
        return key

    async def subscribe() -> None:
        async with emitter.subscribe(provide, "a/"):
            await leave.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subscribe)
        while not broker.clients[0].subscriptions:
            await checkpoint()
        await emitter.keyban(broker.secret_key, first)
        await broker.drop()
        await requested.wait()
        leave.set()
        await anyio.wait_all_tasks_blocked()
        proceed.set()
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


@pytest.mark.virtual_time
async def test_key_function_that_hangs_while_restoring_delays_only_its_subscription(
    anyio_backend: object,
) -> None:
    keys: list[str] = []

    async def provide() -> str:
        if not keys:
            await anyio.sleep_forever()
        return keys.pop()

    async with (
        Broker() as broker,
        connect_reconnecting(connectable=broker.connectable(), request_timeout=5) as client,
    ):
        first, key = broker.keygen("a/", "r"), broker.keygen("b/", "rw")
        keys.append(first)
        async with (
            client.subscribe(provide, "a/") as waiting,
            client.subscribe(key, "b/") as other,
        ):
            await client.keyban(broker.secret_key, first)
            await force_reconnect(client, broker)
            with pytest.raises(TimeoutError, match=r"key.* 5 s"):
                await waiting.receive()
            await client.publish(key, "b/", "x")
            assert (await other.receive()).binary == b"x"


# Wills


async def test_will_accepts_a_key_function(broker: Broker, key: str) -> None:
    keys = Keys(key)
    will = Will(keys, "a/", "gone")
    assert repr(will) == "Will(key=…, channel='a/', retain=False)"
    async with connect(broker.url) as other, other.subscribe(key, "a/") as messages:
        async with connect_reconnecting(broker.url, will=will, client_id="with-will") as emitter:
            async with emitter.stream("connect") as connected:
                await broker.drop("with-will")
                assert (await messages.receive()).binary == b"gone"
                await connected.receive()
        assert (await messages.receive()).binary == b"gone"
    assert keys.calls == 1


async def test_will_whose_key_function_raises_fails_the_connect(broker: Broker) -> None:
    with pytest.raises(ConnectError, match=r"will.*no token today") as caught:
        async with connect_reconnecting(
            broker.url, will=Will(Keys(OSError("no token today")), "a/", "x")
        ):
            raise AssertionError("entered")
    assert isinstance(caught.value.__cause__, OSError)


async def test_key_function_of_a_will_is_not_called_while_reconnecting(
    broker: Broker, key: str
) -> None:
    calls = 0

    async def provide() -> str:
        nonlocal calls
        calls += 1
        if calls > 1:
            await client.flush()
        return key

    async with connect(broker.url) as other, other.subscribe(key, "a/") as messages:
        errors = Calls()
        client = connect_reconnecting(
            broker.url, will=Will(provide, "a/", "gone"), client_id="with-will"
        )
        client.on("error", errors)
        async with client, client.stream("connect") as connected:
            # After a refusal without a known key, every key is requested again except the will's.
            await client.publish(EXPIRED, "a/", "x")
            await errors.get(1)
            await broker.drop("with-will")
            assert (await messages.receive()).binary == b"gone"
            await connected.receive()
        assert (await messages.receive()).binary == b"gone"
    assert calls == 1


# Secrets


async def test_no_key_is_shown(broker: Broker, key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    first = broker.keygen("#/", "rwlsp")
    keys = Keys(first, EXPIRED)
    async with connect_reconnecting(broker.url, will=Will(keys, "will/", "x")) as emitter:
        async with emitter.subscribe(keys, "a/") as messages:
            shown = [repr(emitter), repr(messages)]
            await emitter.keyban(broker.secret_key, first)
            await force_reconnect(emitter, broker)
            with pytest.raises(UnauthorizedError) as caught:
                await messages.receive()
            shown += [repr(caught.value), str(caught.value)]
    for secret in (first, EXPIRED, broker.secret_key):
        assert secret not in " ".join([*shown, caplog.text])


# Failures while restoring


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_interrupt_in_a_key_function_while_restoring_propagates(
    broker: Broker, kind: type[BaseException]
) -> None:
    first, stop = broker.keygen("a/"), kind("stop")

    async def keys() -> str:
        if broker.clients != clients:
            raise stop
        return first

    with pytest.raises(kind) as caught:
        async with connect_reconnecting(broker.url) as emitter:
            clients = broker.clients
            await emitter.subscribe(keys, "a/")
            await emitter.keyban(broker.secret_key, first)
            await broker.drop()
            await anyio.sleep_forever()
    assert caught.value is stop
    assert emitter.state == "closed"


async def test_connection_lost_during_a_key_request_while_restoring(broker: Broker) -> None:
    first, second = broker.keygen("a/"), broker.keygen("#/", "r")
    calls = 0

    async def keys() -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            await broker.drop()
            await anyio.sleep_forever()
        return first if calls == 1 else second

    async with connect_reconnecting(broker.url) as emitter:
        async with emitter.subscribe(keys, "a/") as messages:
            await emitter.keyban(broker.secret_key, first)
            await force_reconnect(emitter, broker)
            await broker.publish("a/", "x")
            assert (await messages.receive()).binary == b"x"
    assert calls == 3
