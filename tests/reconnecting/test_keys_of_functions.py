"""Functions that stand for keys: asked once, and again when the broker has refused the answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import ConnectError, Emitter, NotFoundError, UnauthorizedError, Will, connect
from emitter_anyio.testing import Broker
from tests.client.tools import Calls, Keys, texts
from tests.support.adversity import broker_in_memory
from tests.support.connections import (
    QUICK_BACKOFF,
    connect_reconnecting,
    force_reconnect,
    while_disconnected,
)
from tests.support.memory import MemoryConnectable

EXPIRED = "A" * 32
READS_IT_AS_A_SECRET = (
    "PewgNdBoivX6QbKD8uy1HbBsGF_EUUJj7tN2ZI9zT6Lawo8QI4ZoHIWDSnZA7oNs4B8gKJ_bhLIMiZbsxQgAAQ:3"
)
"""A licence under which ``EXPIRED`` is, until 2066, a secret key of another contract."""


def verbs(emitter: Emitter, broker: Broker) -> Iterable[Callable[[Keys], Awaitable[object]]]:
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


# Live


async def test_every_verb_asks_for_a_key_once(broker: Broker, emitter: Emitter, key: str) -> None:
    keys = Keys(key)
    for verb in verbs(emitter, broker):
        await verb(keys)
    assert keys.asked == 1


async def test_every_verb_asks_again_when_the_key_is_refused(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    for verb in verbs(emitter, broker):
        keys = Keys(EXPIRED, key)
        await verb(keys)
        assert keys.asked == 2


async def test_every_verb_raises_if_the_next_key_is_the_same(
    broker: Broker, emitter: Emitter
) -> None:
    for verb in verbs(emitter, broker):
        keys = Keys(EXPIRED)
        with pytest.raises((UnauthorizedError, ExceptionGroup)):
            await verb(keys)
        assert keys.asked == 2
        await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_the_secret_may_be_a_function_too(broker: Broker, emitter: Emitter) -> None:
    secret = Keys(EXPIRED, broker.secret_key)
    target = Keys((await emitter.keygen(secret, "a/")).key)
    assert secret.asked == 2
    assert await emitter.keyban(secret, target)
    assert (secret.asked, target.asked) == (2, 1)


async def test_a_secret_of_a_contract_that_is_not_found_is_no_better(anyio_backend: object) -> None:
    async with (
        Broker(license=READS_IT_AS_A_SECRET) as broker,
        connect_reconnecting(broker.url) as emitter,
    ):
        with pytest.raises(NotFoundError):
            await emitter.keygen(EXPIRED, "a/")
        secret = Keys(EXPIRED, broker.secret_key)
        assert (await emitter.keygen(secret, "a/")).channel == "a/"
        assert secret.asked == 2


async def test_a_refused_publish_of_qos_0_makes_it_ask_again(
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
    assert keys.asked == 2


async def test_a_key_that_is_refused_later_is_asked_for_again(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    bad = broker.keygen("a/")
    keys = Keys(bad, key)
    await emitter.publish(keys, "a/", "x", qos=1)
    await emitter.keyban(broker.secret_key, bad)
    await emitter.publish(keys, "a/", "x", qos=1)
    assert keys.asked == 2


async def test_many_subscribers_share_one_answer(
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
        assert keys.asked == 2
        assert len(broker.clients[0].subscriptions) == 3
        leave.set()
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_what_the_function_raises_comes_out_where_it_was_needed(
    emitter: Emitter, key: str
) -> None:
    keys = Keys(OSError("no token today"), key)
    with pytest.raises(OSError, match="no token today"):
        await emitter.publish(keys, "a/", "x")
    await emitter.publish(keys, "a/", "x", qos=1)


async def test_a_function_that_is_cancelled_is_asked_by_the_next_one(
    emitter: Emitter, key: str
) -> None:
    asked = 0

    async def provide() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            await anyio.sleep_forever()
        return key

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(emitter.publish, provide, "a/", "x")
                while not asked:
                    await checkpoint()
                tasks.start_soon(emitter.publish, provide, "a/", "x")
                for _ in range(5):
                    await checkpoint()
                scope.cancel()
    assert asked == 2


async def test_what_is_no_key_is_a_type_error(emitter: Emitter) -> None:
    async def number() -> str:
        return 1  # type: ignore[return-value]  # the fault in question

    with pytest.raises(TypeError, match=r"async.*str"):
        await emitter.publish(5, "a/", "x")  # type: ignore[arg-type]  # the fault in question
    with pytest.raises(TypeError, match=r"async.*str"):
        emitter.history(None, "a/")  # type: ignore[arg-type]  # the fault in question
    with pytest.raises(TypeError, match="int"):
        await emitter.publish(number, "a/", "x")
    with pytest.raises(ValueError, match=r"key.*empty"):
        await emitter.publish(Keys(""), "a/", "x")


async def test_a_function_may_ask_the_client_itself(broker: Broker, emitter: Emitter) -> None:
    asked = []

    async def provide() -> str:
        made = await emitter.keygen(broker.secret_key, "a/", "rw")
        asked.append(made.key)
        return made.key

    async with emitter.subscribe(provide, "a/") as messages:
        for _ in range(2):
            await emitter.publish(provide, "a/", "x", qos=1)
            assert (await messages.receive()).binary == b"x"
            await emitter.keyban(broker.secret_key, asked[-1])
            # Restoring asks it, too, while all others wait.
            await force_reconnect(emitter, broker)
    assert len(asked) == 3


async def test_the_key_of_a_link_is_asked_for_again_when_the_link_is_used(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, "a/")
    keys = Keys(EXPIRED, EXPIRED + "B", key)
    await emitter.link(keys, "a/", "x")
    assert keys.asked == 1
    with pytest.raises(UnauthorizedError):
        await emitter.publish_with_link("x", "refused twice", qos=1)
    await emitter.publish_with_link("x", "taken", qos=1)
    await emitter.publish_with_link("x", "too")
    assert texts(await calls.get(2)) == ["taken", "too"]
    assert keys.asked == 3


# On the next link


async def test_all_that_is_refused_on_the_next_link_is_asked_for_again(
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
        async with connect(broker.url, reconnect=QUICK_BACKOFF) as banner:
            await emitter.keyban(broker.secret_key, first)
            async with while_disconnected(emitter, broker):
                await broker.publish("a/", "stored", ttl=60)
            assert (await messages.receive()).replayed
            await emitter.publish_with_link("x", "live", qos=1)
            assert (await messages.receive()).binary == b"live"
            await broker.publish("b/", "too")
            assert (await others.receive()).binary == b"too"
            assert (await feed.receive()).event == "status"
            came = len(presences.values)
            await banner.subscribe(key, "w/")
            await banner.subscribe(key, "p/")
            await presences.get(came + 1)
            while not feed.members:
                await feed.receive()
        assert keys.asked == 2
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_the_same_refused_key_ends_the_stream(broker: Broker, emitter: Emitter) -> None:
    first = broker.keygen("a/")
    keys = Keys(first)
    async with emitter.subscribe(keys, "a/") as messages:
        await emitter.keyban(broker.secret_key, first)
        await force_reconnect(emitter, broker)
        with pytest.raises(UnauthorizedError):
            await messages.receive()
        assert keys.asked == 2


async def test_a_function_that_raises_on_the_next_link_ends_the_stream_alone(
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


async def test_a_subscription_left_while_its_key_is_asked_for(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    first = broker.keygen("a/")
    asking, answer, leave = anyio.Event(), anyio.Event(), anyio.Event()
    given = [first]

    async def provide() -> str:
        if given:
            return given.pop()
        asking.set()
        await answer.wait()
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
        await asking.wait()
        leave.set()
        await anyio.wait_all_tasks_blocked()
        answer.set()
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


@pytest.mark.virtual_time
async def test_one_that_does_not_answer_on_restoring_holds_up_its_own_subscription_only(
    anyio_backend: object,
) -> None:
    given: list[str] = []

    async def provide() -> str:
        if not given:
            await anyio.sleep_forever()
        return given.pop()

    connectable = MemoryConnectable()
    async with (
        broker_in_memory(connectable) as broker,
        connect_reconnecting(connectable=connectable, request_timeout=5) as client,
    ):
        first, key = broker.keygen("a/", "r"), broker.keygen("b/", "rw")
        given.append(first)
        async with (
            client.subscribe(provide, "a/") as silent,
            client.subscribe(key, "b/") as other,
        ):
            await client.keyban(broker.secret_key, first)
            await force_reconnect(client, broker)
            with pytest.raises(TimeoutError, match=r"key.* 5 s"):
                await silent.receive()
            await client.publish(key, "b/", "x")
            assert (await other.receive()).binary == b"x"


# Wills


async def test_a_will_takes_a_function(broker: Broker, key: str) -> None:
    keys = Keys(key)
    will = Will(keys, "a/", "gone")
    assert repr(will) == "Will(key=…, channel='a/', retain=False)"
    async with connect(broker.url) as other, other.subscribe(key, "a/") as messages:
        async with connect_reconnecting(broker.url, will=will, client_id="mortal") as emitter:
            async with emitter.stream("connect") as connected:
                await broker.drop("mortal")
                assert (await messages.receive()).binary == b"gone"
                await connected.receive()
        assert (await messages.receive()).binary == b"gone"
    assert keys.asked == 1


async def test_a_will_without_a_key_opens_no_link(broker: Broker) -> None:
    with pytest.raises(ConnectError, match=r"will.*no token today") as caught:
        async with connect_reconnecting(
            broker.url, will=Will(Keys(OSError("no token today")), "a/", "x")
        ):
            raise AssertionError("entered")
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_will_whose_function_needs_the_link_does_not_keep_it_away(
    broker: Broker, key: str
) -> None:
    asked = 0

    async def provide() -> str:
        nonlocal asked
        asked += 1
        if asked > 1:
            await client.flush()
        return key

    async with connect(broker.url) as other, other.subscribe(key, "a/") as messages:
        errors = Calls()
        client = connect_reconnecting(
            broker.url, will=Will(provide, "a/", "gone"), client_id="mortal"
        )
        client.on("error", errors)
        async with client, client.stream("connect") as connected:
            # Some key or other was refused, so all are asked for again, but for the will's.
            await client.publish(EXPIRED, "a/", "x")
            await errors.get(1)
            await broker.drop("mortal")
            assert (await messages.receive()).binary == b"gone"
            await connected.receive()
        assert (await messages.receive()).binary == b"gone"
    assert asked == 1


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


# At a bad moment


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_a_function_may_end_the_program_while_the_link_is_restored(
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


async def test_a_function_may_still_be_asked_when_that_link_is_lost_too(broker: Broker) -> None:
    first, second = broker.keygen("a/"), broker.keygen("#/", "r")
    asked = 0

    async def keys() -> str:
        nonlocal asked
        asked += 1
        if asked == 2:
            await broker.drop()
            await anyio.sleep_forever()
        return first if asked == 1 else second

    async with connect_reconnecting(broker.url) as emitter:
        async with emitter.subscribe(keys, "a/") as messages:
            await emitter.keyban(broker.secret_key, first)
            await force_reconnect(emitter, broker)
            await broker.publish("a/", "x")
            assert (await messages.receive()).binary == b"x"
    assert asked == 3
