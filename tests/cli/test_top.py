"""``top``: lines, JSON and the live table."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from emitter_anyio import NodeStats, decode_stats
from emitter_anyio._cli import _top
from emitter_anyio.testing import Broker
from tests.cli.conftest import Cli
from tests.support.background import Background, publishing
from tests.support.stats import RECORDED
from tests.support.terminal import terminal

STATS = decode_stats(RECORDED)


class TestLines:
    def test_text(self, cli: Cli, server: Background, unique: str, backend: str) -> None:
        server.when_subscribed(unique, publishing(f"{unique}x/", RECORDED))
        done = cli("top", "--channel", unique, "--count", "1", "--backend", backend)
        assert (done.code, done.errors) == (0, "")
        assert done.output[8:] == (
            "  00:00:00:00:00:01  1 connection  4 subscriptions  1 peer  in 7/s  out 9/s\n"
        )

    def test_json(self, cli: Cli, server: Background, unique: str, backend: str) -> None:
        server.when_subscribed(unique, publishing(f"{unique}x/", RECORDED))
        done = cli("top", "--channel", unique, "-n", "1", "--json", "--backend", backend)
        assert json.loads(done.output) == {
            "time": "2026-11-30T12:25:18Z",
            "node": "00:00:00:00:00:01",
            "address": "127.0.0.1:28500",
            "uptime": 6,
            "connections": 1,
            "subscriptions": 4,
            "peers": 1,
            "seconds": 1.0,
            "received": 7,
            "sent": 9,
            "received_per_second": 7.0,
            "sent_per_second": 9.0,
        }

    def test_development_broker_publishes_its_figures(self, cli: Cli) -> None:
        first, second = map(json.loads, cli("top", "-n", "2", "--json").lines)
        assert (first["connections"], first["peers"]) == (2, 0)
        assert second["node"] == first["node"]

    def test_other_messages_are_ignored_with_a_note(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        server.when_subscribed(unique, publishing(f"{unique}x/", "x", RECORDED))
        done = cli("top", "--channel", unique, "-n", "1")
        assert len(done.lines) == 1
        assert done.error.startswith(f"ignored a message from {unique}x/: invalid snapshot")

    def test_names_from_the_network_are_escaped(
        self, cli: Cli, server: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_top, "decode_stats", lambda payload: replace(STATS, node="a\x1bb"))
        server.when_subscribed(unique, publishing(f"{unique}x/", "x"))
        assert "  a\\x1bb  " in cli("top", "--channel", unique, "-n", "1").output

    def test_missing_figures_are_explained(
        self, cli: Cli, server: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notes = []

        def publish(text: str) -> None:
            notes.append(text)
            server.start_soon(lambda: server.broker.publish(f"{unique}x/", RECORDED))

        monkeypatch.setattr(_top, "_SILENT_SECONDS", 2)
        monkeypatch.setattr(_top, "note", publish)
        assert cli("top", "--channel", unique, "-n", "1").code == 0
        (note,) = notes
        assert note.startswith("no figures for 2 s: Emitter publishes them unless ")

    def test_refused_key(self, cli: Cli, server: Background) -> None:
        done = cli("top", "--key", server.key("stats/#/", "w"))
        assert done.code == 1
        assert "'r' (read)" in done.error


class TestTable:
    @pytest.mark.parametrize("rich", [True, False])
    def test_nodes_are_shown_on_a_terminal(
        self, server: Background, unique: str, backend: str, rich: bool
    ) -> None:
        async def publish(broker: Broker) -> None:
            await broker.publish(f"{unique}x/", RECORDED)

        server.when_subscribed(unique, publish)
        hide = "" if rich else "sys.modules['rich.console'] = None; "
        program = f"import sys; {hide}from emitter_anyio._cli import main; sys.exit(main())"
        environment = {
            "EMITTER_URL": server.url,
            "EMITTER_SECRET": server.secret,
            "TERM": "xterm",
            "COLUMNS": "80",
        }
        with terminal() as screen:
            process = screen.start(
                *("-c", program, "top", "--channel", unique, "--backend", backend), **environment
            )
            screen.wait_for("00:00:00:00:00:01 " if rich else "in 7/s  out 9/s")
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
            screen.close_program_side()
        assert "Traceback" not in screen.text
        if rich:
            assert "waiting for the first figures" in screen.text
            assert "1 node" in screen.text
            words = ("00:00:00:00:00:01", "1", "4", "1", "7", "9", "6s")
            assert any(tuple(line.split()) == words for line in screen.text.splitlines())
            # The cursor is shown again at the end.
            assert screen.raw.rindex(b"\x1b[?25h") > screen.raw.rindex(b"\x1b[?25l")


def later(stats: NodeStats, seconds: int, **fields: int) -> NodeStats:
    """Return figures that were published later, after an interval of a second."""
    moved = timedelta(seconds=seconds)
    return replace(stats, start=stats.start + moved, end=stats.end + moved, **fields)  # type: ignore[arg-type]  # the fields are numbers


class TestNode:
    @pytest.fixture(autouse=True)
    def _clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(_top, "current_time", lambda: self.now)

    def test_rates_are_averages_of_five_seconds(self) -> None:
        node = _top._Node()
        node.add(replace(STATS, received=1000))
        for second, received in enumerate((10, 20, 0, 0, 20), 1):
            node.add(later(STATS, second, received=received))
        assert node.rates() == (10.0, 9.0)

    def test_interval_below_a_second_has_a_rate(self) -> None:
        node = _top._Node()
        node.add(replace(STATS, start=STATS.end))
        assert node.rates() == (7.0, 9.0)

    def test_long_interval(self) -> None:
        node = _top._Node()
        node.add(STATS)
        node.add(replace(STATS, end=STATS.start + timedelta(seconds=60), received=120))
        assert node.rates()[0] == 2.0

    def test_row(self) -> None:
        node = _top._Node()
        node.add(replace(STATS, connections=12345))
        name = "00:00:00:00:00:01"
        assert _top._to_row(node) == [name, "12,345", "4", "1", "7", "9", "6s"]
        self.now += 7
        assert _top._to_row(node) == [name, "", "", "", "", "", "silent 7s"]

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0s"), (59, "59s"), (60, "1m 0s"), (3725, "1h 2m"), (90_000, "1d 1h")],
    )
    def test_uptime(self, seconds: int, text: str) -> None:
        assert _top._duration(seconds) == text


@pytest.mark.anyio
async def test_silent_node_is_updated_in_the_table() -> None:
    """Without messages, a table is still drawn once a second."""
    summaries = []
    node = _top._Node()
    node.add(STATS)

    def update(summary: str, rows: Sequence[Sequence[str]], footer: str) -> None:
        summaries.append(summary)

    async def updates() -> AsyncGenerator[_top._Node | None]:
        yield None
        yield node
        yield None

    await _top._show(updates(), update)
    assert summaries == ["waiting for the first figures", "0 nodes", "1 node", "1 node"]
