"""The results that ``doctor`` prints."""

from __future__ import annotations

import sys
from typing import Final, Literal, TypeAlias

from ._formats import to_json
from ._output import print_line
from ._terminal import make_styler

Status: TypeAlias = Literal["ok", "note", "failed", "skipped"]

_STYLES: Final[dict[Status, str]] = {
    "ok": "green",
    "note": "yellow",
    "failed": "bold red",
    "skipped": "dim",
}


class Report:
    """
    Prints the results of checks as they arrive.

    :param as_json: whether to print JSON, one object per line
    """

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._style = make_styler(sys.stdout)
        self._failed: list[str] = []

    def add(self, check: str, status: Status, text: str, fix: str = "") -> None:
        """
        Print a result.

        :param check: the name of the check
        :param status: ``"note"`` for an observation, ``"failed"`` for a problem
        :param text: the observation
        :param fix: a suggestion to the user, or ``""``
        """
        if status == "failed":
            self._failed.append(check)
        if self._json:
            result = {"check": check, "status": status, "text": text}
            print_line(to_json({**result, "fix": fix} if fix else result))
            return
        print_line(f"{check:<11}{text}", styled=self._style(f"{status:<9}", _STYLES[status]))
        if fix:
            print_line(f"{'':<9}{'':<11}-> {fix}")

    @property
    def failed(self) -> list[str]:
        """The names of the failed checks."""
        return self._failed

    def close(self, text: str) -> None:
        """Print a summary, unless the output is JSON."""
        if not self._json:
            print_line("", styled=self._style(text, "bold green"))
