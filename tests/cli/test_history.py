"""``history``: formats, windows, order and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.support.background import Background


def store(server: Background, channel: str, number: int = 3) -> None:
    for each in range(number):
        server.publish(channel, f"m{each}", ttl=60)


class TestHistory:
    def test_json_lines_oldest_first(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        store(server, unique)
        done = cli("history", unique, "--backend", backend)
        assert (done.code, done.errors) == (0, "")
        messages = [json.loads(line) for line in done.lines]
        assert [each["payload"] for each in messages] == ["m0", "m1", "m2"]
        assert all(each["id"] and each["time"].endswith("Z") for each in messages)

    def test_newest_first(self, cli: Cli, server: Background, unique: str, backend: str) -> None:
        store(server, unique, 300)
        done = cli(
            *("history", unique, "--newest-first", "--last=299", "--format=text"),
            *("--backend", backend),
        )
        assert done.lines == [f"m{each}" for each in range(299, 0, -1)]

    def test_last_since_and_until_limit_the_messages(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        store(server, unique)
        assert cli("history", unique, "--since", "1h", "--last", "2").output.count("\n") == 2
        assert cli("history", unique, "--until", "1d").output == ""
        assert cli("history", unique, "--last", "0").output == ""

    def test_unreadable_messages_fail_after_the_others_are_printed(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        store(server, unique)
        server.broker.advance(2)
        server.publish(unique, "x" * 60_000, ttl=60)
        server.broker.advance(2)
        done = cli("history", unique)
        assert [json.loads(line)["payload"] for line in done.lines] == ["m0", "m1", "m2"]
        assert done.code == 1
        assert "could not be read" in done.error

    def test_wildcard_in_first_level_is_rejected(self, cli: Cli) -> None:
        done = cli("history", "+/a/")
        assert done.code == 2
        assert "literal first level" in done.error

    def test_refusal_names_the_missing_permission(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        done = cli("history", unique, "--key", server.key(unique, "r"))
        assert done.code == 1
        assert "'l' (load)" in done.error

    @pytest.mark.parametrize("order", [[], ["--newest-first"]])
    def test_progress_bar_is_shown_on_a_terminal(
        self, on_terminal: Any, server: Background, unique: str, backend: str, order: list[str]
    ) -> None:
        store(server, unique)
        code, screen = on_terminal("history", unique, *order, "--backend", backend)
        assert code == 0
        assert screen.text.count('"payload": "m') == 3
        # With --newest-first, lines are printed while messages are read, so there is no bar.
        assert (f"reading {unique}" in screen.text) == (not order)
