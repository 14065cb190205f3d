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

_MENTIONED: Final[dict[Status, str]] = {"note": "notes", "skipped": "not checked"}
"""What the verdict calls checks that neither passed nor failed."""


class Report:
    """
    Prints the results of checks as they arrive.

    :param as_json: whether to print JSON, one object per line
    """

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._style = make_styler(sys.stdout)
        self._checks: dict[Status, list[str]] = {"failed": [], "note": [], "skipped": [], "ok": []}

    def add(self, check: str, status: Status, text: str, fix: str = "") -> None:
        """
        Print a result.

        :param check: the name of the check
        :param status: ``"note"`` for an observation, ``"failed"`` for a problem
        :param text: the observation
        :param fix: a suggestion to the user, or ``""``
        """
        self._checks[status].append(check)
        if self._json:
            result = {"check": check, "status": status, "text": text}
            print_line(to_json({**result, "fix": fix} if fix else result))
            return
        print_line(f"{check:<11}{text}", styled=self._style(f"{status:<9}", _STYLES[status]))
        if fix:
            print_line(f"{'':<9}{'':<11}-> {fix}")

    def close(self) -> bool:
        """Print the verdict, and return whether no check failed."""
        if failed := self._checks["failed"]:
            self.add("verdict", "failed", f"failed checks: {', '.join(failed)}")
            return False
        parts = ["no problems found"]
        for status, words in _MENTIONED.items():
            if checks := self._checks[status]:
                parts.append(f"{words}: {', '.join(checks)}")
        self.add("verdict", "ok", "; ".join(parts))
        return True
