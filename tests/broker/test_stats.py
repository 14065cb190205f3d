"""The figures that a node of the development broker publishes."""

from __future__ import annotations

import pytest

from emitter_anyio import DecodedMessage, EventStream, NodeStats, connect, decode_stats
from emitter_anyio.testing import Broker

pytestmark = pytest.mark.anyio

INTERVAL = 0.02


async def until(stream: EventStream[DecodedMessage[NodeStats]], **fields: object) -> NodeStats:
    """Receive until the figures have these values."""
    async for message in stream:
        if all(getattr(message.value, name) == value for name, value in fields.items()):
            return message.value
    raise AssertionError("the stream ended")


async def test_gauges_follow_clients_and_subscriptions() -> None:
    async with Broker(stats_interval=INTERVAL) as broker, connect(broker.url) as emitter:
        key = broker.keygen("#/", "rw")
        async with emitter.subscribe(key, "stats/", decode=decode_stats) as figures:
            stats = await until(figures, connections=1, subscriptions=1, peers=0)
            assert stats.address == f"{broker.host}:{broker.port}"
            async with connect(broker.url) as other, other.subscribe(key, "a/"):
                again = await until(figures, connections=2, subscriptions=2)
                assert again.node == stats.node
            await until(figures, connections=1, subscriptions=1)


async def test_counts_cover_one_interval() -> None:
    async with Broker(stats_interval=INTERVAL) as broker, connect(broker.url) as emitter:
        key = broker.keygen("#/", "rw")
        totals = {"rcv.pub": 0, "rcv.sub": 0, "send.pub": 0, "rcv.pingreq": 0}
        async with emitter.subscribe(key, "stats/", decode=decode_stats, last=0) as figures:
            async with emitter.subscribe(key, "a/"):
                for _ in range(3):
                    await emitter.publish(key, "a/", "m")
                await emitter.flush()
                messages = 0
                async for message in figures:
                    metrics = message.value.metrics
                    for name in totals:
                        totals[name] += metrics[name].count if name in metrics else 0
                    # The figures that have been received were sent before this snapshot.
                    if totals["rcv.pingreq"] and totals["send.pub"] >= 3 + messages:
                        break
                    messages += 1
    assert totals == {"rcv.pub": 3, "rcv.sub": 2, "send.pub": 3 + messages, "rcv.pingreq": 1}


async def test_nodes_of_a_cluster_have_channels_and_names_of_their_own() -> None:
    async with (
        Broker(stats_interval=INTERVAL) as a,
        Broker(cluster=a, stats_interval=INTERVAL) as b,
    ):
        async with connect(a.url) as emitter:
            key = a.keygen("stats/#/", "r")
            channels: dict[str, str] = {}
            async with emitter.subscribe(key, "stats/", decode=decode_stats) as figures:
                async for message in figures:
                    channels[message.channel] = message.value.node
                    # As in Emitter, a node counts the subscriptions of the others.
                    assert (message.value.subscriptions, message.value.peers) == (1, 1)
                    if len(channels) == 2:
                        break
                assert len(set(channels.values())) == 2
                assert [channel.split("/")[1] for channel in channels] == [
                    node.replace(":", "") for node in channels.values()
                ]
                await b.stop()
                await until(figures, peers=0)


async def test_paused_node_publishes_nothing() -> None:
    async with (
        Broker(stats_interval=INTERVAL) as a,
        Broker(cluster=a, stats_interval=INTERVAL) as b,
    ):
        async with connect(a.url) as emitter:
            key = a.keygen("stats/#/", "r")
            async with emitter.subscribe(key, "stats/", decode=decode_stats) as figures:
                paused = (await until(figures, connections=0)).node
                b.pause()
                while figures.statistics().current_buffer_used:
                    figures.receive_nowait()
                for _ in range(5):
                    assert (await figures.receive()).value.node != paused
                b.resume()
                await until(figures, node=paused)


async def test_uptime_begins_again_with_a_restart() -> None:
    async with Broker(stats_interval=INTERVAL) as broker:
        key = broker.keygen("stats/#/", "r")
        broker.advance(100)
        async with connect(broker.url) as emitter:
            async with emitter.subscribe(key, "stats/", decode=decode_stats) as figures:
                assert (await figures.receive()).value.uptime >= 100
        await broker.restart()
        async with connect(broker.url) as emitter:
            async with emitter.subscribe(key, "stats/", decode=decode_stats) as figures:
                assert (await figures.receive()).value.uptime < 100


async def test_none_turns_them_off() -> None:
    async with Broker(stats_interval=None) as broker, connect(broker.url) as emitter:
        key = broker.keygen("#/", "rw")
        async with emitter.subscribe(key, "stats/") as messages:
            await emitter.publish(key, "stats/x/", "only this")
            assert (await messages.receive()).as_string() == "only this"


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_interval_must_be_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="invalid stats_interval: expected more than 0, got"):
        Broker(stats_interval=seconds)
