"""Faults of nodes under numbered traffic: no message is lost without being accounted for."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import pytest

from .driver import Cluster, faults_from_environment, read_everything
from .traffic import Traffic

pytestmark = pytest.mark.timeout(300)

Record = Callable[[str, object], None]


@pytest.fixture
def traffic(cluster: Cluster, key: str, unique: str) -> Traffic:
    return Traffic(cluster, key, unique)


async def check_history(traffic: Traffic, cluster: Cluster, key: str, channel: str) -> None:
    """Check that each node returns all stored messages, or that the client reports a part."""
    stored = traffic.stored
    async with cluster.clients() as clients:
        for client in clients:
            found, missing = await read_everything(client, key, channel)
            assert missing or stored <= set(found)


async def check(traffic: Traffic, cluster: Cluster, key: str, channel: str, record: Record) -> None:
    """Check the account, and that history has everything that the nodes have stored."""
    account = traffic.account()
    for name, count in account.figures.items():
        if name.startswith("unseen"):
            record(name, count)
    assert account.breaches == []
    assert not any("without a fault" in name for name in account.figures)
    async with cluster.clients() as clients:
        for client in clients:
            while True:
                found, missing = await read_everything(client, key, channel)
                assert len(found) == len(set(found))
                if not missing:  # a busy node is reported as missing
                    break
            assert traffic.stored <= set(found)


@pytest.mark.parametrize("node", [0, -1])
@pytest.mark.parametrize("fault", faults_from_environment())
async def test_fault_of_a_node_loses_nothing_unnoticed(
    cluster: Cluster,
    traffic: Traffic,
    key: str,
    unique: str,
    fault: str,
    node: int,
    record_property: Record,
) -> None:
    begin, end = faults_from_environment()[fault]
    index = range(len(cluster.urls))[node]
    async with traffic.flowing():
        async with traffic.fault():
            began = monotonic()
            await cluster.do(begin, index)
            if begin == "erase":
                traffic.erased(cluster.urls[index], began)
            await traffic.flow()
            await cluster.do(end, index)
            await cluster.ready()
            await traffic.flow()
            await check_history(traffic, cluster, key, unique)
    await check(traffic, cluster, key, unique, record_property)


async def test_rolling_restart_loses_nothing_unnoticed(
    cluster: Cluster, traffic: Traffic, key: str, unique: str, record_property: Record
) -> None:
    async with traffic.flowing():
        for node in range(len(cluster.urls)):
            async with traffic.fault():
                await cluster.do("stop", node)
                await cluster.do("start", node)
                await traffic.flow()
    await check(traffic, cluster, key, unique, record_property)
