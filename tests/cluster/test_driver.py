"""A sample of the cluster suite, through commands, as real nodes are driven."""

from __future__ import annotations

import os
import sys

import pytest

from tests.support import command

from .driver import CommandCluster, cluster_from_environment, faults_from_environment

SCRIPT = """
import anyio

from tests.cluster.driver import cluster_from_environment


async def main():
    cluster = cluster_from_environment()
    assert await cluster.is_sound()
    for begin, end in (("pause", "resume"), ("cut", "heal"), ("erase", "start")):
        await cluster.do(begin, 1)
        await cluster.do(end, 1)
    await cluster.reset()
    try:
        await cluster.do("explode", 1)
    except Exception as exc:
        print("refused:", type(exc).__name__)


anyio.run(main)
"""


def test_launcher_runs_nodes_that_obey_commands() -> None:
    result = command.run("-m", "tests.cluster", "--", sys.executable, "-c", SCRIPT)
    assert "refused: CalledProcessError" in result.stdout, result.stderr
    assert "unknown action 'explode'" in result.stderr
    assert result.returncode == 0


def test_nodes_and_faults_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EMITTER_")]:
        monkeypatch.delenv(name)
    assert cluster_from_environment() is None
    assert set(faults_from_environment()) == {"killed", "paused", "cut off"}
    monkeypatch.setenv("EMITTER_CLUSTER", "mqtt://a:1 mqtt://b:2")
    with pytest.raises(RuntimeError, match="EMITTER_CLUSTER_COMMAND"):
        cluster_from_environment()
    monkeypatch.setenv("EMITTER_SECRET", "A" * 32)
    monkeypatch.setenv("EMITTER_CLUSTER_COMMAND", "ssh 'control node'")
    monkeypatch.setenv("EMITTER_CLUSTER_FAULTS", "slow/unslow fill/empty")
    cluster = cluster_from_environment()
    assert isinstance(cluster, CommandCluster)
    assert cluster.servers_from(1) == ["mqtt://b:2", "mqtt://a:1"]
    assert faults_from_environment()["fill"] == ("fill", "empty")
