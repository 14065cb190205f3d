"""The checks of ``doctor`` that concern the nodes of a cluster."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

from emitter_anyio import (
    ConnectionLostError,
    Emitter,
    EmitterError,
    HistoryIncompleteError,
    NotFoundError,
)

from ._report import Report
from ._source import Source, connect_once

_EARLIEST: Final = datetime(2018, 1, 2, tzinfo=UTC)
"""A time before that of any stored message, so that the reply is short."""

LOG_FIX: Final = "look at the broker's log of this time"
"""What to do about an unexpected error."""

_CLUSTER_FIX: Final = 'add "cluster" to the broker\'s configuration, even for a single node'


class ClusterChecks:
    """
    Checks requests that concern all nodes, each on its own connection.

    A broker that is configured without a cluster fails in these requests: it replies with the
    status 404 and closes the connection.

    :param source: the broker and the keys
    :param report: receives the result of each check
    :param timeout: the timeout of each step in seconds
    """

    def __init__(self, source: Source, report: Report, timeout: float) -> None:
        self._source = source
        self._report = report
        self._timeout = timeout

    async def check_history(self, key: str, channel: str) -> bool:
        """
        Check that every node that the broker asks for stored messages answers.

        :param key: a key with permission l
        :param channel: the channel of the key
        :return: whether the broker has a cluster, as far as is known
        """
        start = time.perf_counter()
        try:
            async with self._connect() as emitter:
                # A busy machine might be as slow as a broker that waits for a node, but rarely
                # twice.
                start = time.perf_counter()
                if not await _read(emitter, key, channel):
                    start = time.perf_counter()
                    if not await _read(emitter, key, channel):
                        self._add_missing_node(time.perf_counter() - start)
                        return True
        except (NotFoundError, ConnectionLostError):
            text = "the broker cannot read stored messages: it is configured without a cluster"
            self._report.add("history", "failed", text, _CLUSTER_FIX)
            return False
        except EmitterError as exc:
            self._report.add("history", "failed", str(exc), LOG_FIX)
        else:
            took = f"{(time.perf_counter() - start) * 1e3:.1f} ms"
            text = f"every node that the broker asks for stored messages answered, in {took}"
            self._report.add("history", "ok", text)
        return True

    def _add_missing_node(self, took: float) -> None:
        self._report.add(
            "history",
            "failed",
            f"a node that the broker asks for stored messages does not answer: the reply took "
            f"{took:.1f} s, and lacks the messages of that node",
            "check the other nodes of the cluster, and the network between them",
        )

    async def check_bans(self, secret: str, target: str) -> None:
        """
        Check that the broker can ban keys, by lifting a ban that is not there.

        :param target: a channel key that was never banned
        """
        try:
            async with self._connect() as emitter:
                await emitter.keyban(secret, target, False)
        except (NotFoundError, ConnectionLostError):
            text = "the broker cannot ban keys: it is configured without a cluster"
            self._report.add("keyban", "note", text, _CLUSTER_FIX)
        except EmitterError as exc:
            self._report.add("keyban", "failed", str(exc), LOG_FIX)
        else:
            self._report.add("keyban", "ok", "the broker can ban keys")

    @asynccontextmanager
    async def _connect(self) -> AsyncGenerator[Emitter]:
        options = {"connect_timeout": self._timeout, "request_timeout": self._timeout}
        async with connect_once(self._source, **options) as emitter:
            yield emitter


async def _read(emitter: Emitter, key: str, channel: str) -> bool:
    """Request messages older than any, and return whether every node has answered in time."""
    try:
        await anext(emitter.history(key, channel, 1, until=_EARLIEST), None)
    except HistoryIncompleteError:
        return False
    return True
