"""Run test modules as users do."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.command import run


def run_pytest(folder: Path, source: str) -> dict[str, list[str]]:
    """
    Run a test module in a folder without other configuration.

    :return: the names of the tests by outcome
    """
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_module.py").write_text(source)
    done = run("-m", "pytest", "--color=no", "-rA", "-p", "no:cacheprovider", str(folder))
    outcomes: dict[str, list[str]] = {}
    for outcome, name in re.findall(
        r"^(PASSED|FAILED|ERROR) .*test_module\.py::(\S+)", done.stdout, re.MULTILINE
    ):
        outcomes.setdefault(outcome, []).append(name)
    assert outcomes, done.stdout + done.stderr
    return outcomes
