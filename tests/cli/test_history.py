"""``history``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.support.background import Background


def store(place: Background, channel: str, number: int = 3) -> None:
    for each in range(number):
        place.publish(channel, f"m{each}", ttl=60)


class TestHistory:
    def test_json_lines_oldest_first(
        self, cli: Cli, place: Background, unique: str, backend: str
    ) -> None:
        store(place, unique)
        done = cli("history", unique, "--backend", backend)
        assert (done.code, done.errors) == (0, "")
        told = [json.loads(line) for line in done.lines]
        assert [each["payload"] for each in told] == ["m0", "m1", "m2"]
        assert all(each["id"] and each["time"].endswith("Z") for each in told)

    def test_newest_first(self, cli: Cli, place: Background, unique: str, backend: str) -> None:
        store(place, unique, 300)
        done = cli(
            *("history", unique, "--newest-first", "--last=299", "--format=text"),
            *("--backend", backend),
        )
        assert done.lines == [f"m{each}" for each in range(299, 0, -1)]

    def test_window(self, cli: Cli, place: Background, unique: str) -> None:
        store(place, unique)
        assert cli("history", unique, "--since", "1h", "--last", "2").output.count("\n") == 2
        assert cli("history", unique, "--until", "1d").output == ""
        assert cli("history", unique, "--last", "0").output == ""

    def test_what_cannot_be_read_fails_after_the_rest(
        self, cli: Cli, place: Background, unique: str
    ) -> None:
        store(place, unique)
        place.broker.advance(2)
        place.publish(unique, "x" * 60_000, ttl=60)
        place.broker.advance(2)
        done = cli("history", unique)
        assert [json.loads(line)["payload"] for line in done.lines] == ["m0", "m1", "m2"]
        assert done.code == 1
        assert "could not be read" in done.error

    def test_a_first_level_that_is_a_wildcard(self, cli: Cli) -> None:
        done = cli("history", "+/a/")
        assert done.code == 2
        assert "literal first level" in done.error

    def test_refused(self, cli: Cli, place: Background, unique: str) -> None:
        done = cli("history", unique, "--key", place.key(unique, "r"))
        assert done.code == 1
        assert "'l' (load)" in done.error

    @pytest.mark.parametrize("order", [[], ["--newest-first"]])
    def test_on_a_terminal(
        self, on_terminal: Any, place: Background, unique: str, backend: str, order: list[str]
    ) -> None:
        store(place, unique)
        code, screen = on_terminal("history", unique, *order, "--backend", backend)
        assert code == 0
        assert screen.text.count('"payload": "m') == 3
        # Lines and a bar do not go together.
        assert (f"reading {unique}" in screen.text) == (not order)
