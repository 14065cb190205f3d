"""What the doctor finds: a verdict each, and a way out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from ._formats import to_json
from ._output import say
from ._painting import painter

Verdict: TypeAlias = Literal["ok", "note", "wrong", "untried"]

_STYLES: Final[dict[Verdict, str]] = {
    "ok": "green",
    "note": "yellow",
    "wrong": "bold red",
    "untried": "dim",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that was looked at.

    :ivar check: what was looked at
    :ivar verdict: ``"note"`` is worth knowing, ``"wrong"`` keeps things from working
    :ivar text: what was seen
    :ivar way: a way out, if there is one
    """

    check: str
    verdict: Verdict
    text: str
    way: str = ""


class Report:
    """
    Prints findings as they come.

    :param as_json: as JSON, one on each line
    """

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._paint = painter(sys.stdout)
        self._findings: list[Finding] = []

    def add(self, check: str, verdict: Verdict, text: str, way: str = "") -> None:
        """Print a finding."""
        found = Finding(check, verdict, text, way)
        self._findings.append(found)
        if self._json:
            told = {"check": check, "verdict": verdict, "text": text}
            say(to_json({**told, "way": way} if way else told))
            return
        say(f"{check:<11}{text}", painted=self._paint(f"{verdict:<9}", _STYLES[verdict]))
        if way:
            say(f"{'':<9}{'':<11}-> {way}")

    @property
    def wrong(self) -> list[str]:
        """The checks that say that something is wrong."""
        return [found.check for found in self._findings if found.verdict == "wrong"]

    def close(self, text: str) -> None:
        """Print what it comes to, for people."""
        if not self._json:
            say("", painted=self._paint(text, "bold green"))
