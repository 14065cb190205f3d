"""Test modules as users run them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.command import run


def run_pytest(folder: Path, source: str) -> dict[str, list[str]]:
    """
    Run a test module as a user does, who has no configuration.

    :return: by outcome, the tests that had it
    """
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(source)
    done = run("-m", "pytest", "--color=no", "-rA", "-p", "no:cacheprovider", str(folder))
    outcomes: dict[str, list[str]] = {}
    for outcome, name in re.findall(
        r"^(PASSED|FAILED|ERROR) .*test_it\.py::(\S+)", done.stdout, re.MULTILINE
    ):
        outcomes.setdefault(outcome, []).append(name)
    assert outcomes, done.stdout + done.stderr
    return outcomes
