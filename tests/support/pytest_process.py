"""Run test modules as users do."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

from tests.support.command import run

PLUGINS = {
    "anyio": r"anyio_mode|mark\.anyio",
    "asyncio": r"asyncio_mode|mark\.asyncio",
    "trio": r"trio_mode|mark\.trio",
}
"""The plugins that run asynchronous tests, with a pattern for modules that use them."""


def run_pytest(folder: Path, source: str, config: str = "") -> dict[str, list[str]]:
    """
    Run a test module in a folder, with the plugins that it or its configuration mentions.

    :param config: the content of ``pyproject.toml``
    :return: the names of the tests by outcome
    """
    (folder / "pyproject.toml").write_text(config or "[tool.pytest.ini_options]\n")
    (folder / "test_module.py").write_text(source)
    used = {
        name for name, pattern in PLUGINS.items() if re.search(rf"\b({pattern})", config + source)
    }
    # Importing the other plugins of this environment, such as Hypothesis, takes most of the time.
    unused = entry_points(group="pytest11").names - used - {"emitter_anyio"}
    options = ("--color=no", "-rA", "-pno:cacheprovider", *(f"-pno:{name}" for name in unused))
    done = run("-m", "pytest", *options, str(folder))
    outcomes: dict[str, list[str]] = {}
    for outcome, name in re.findall(
        r"^(PASSED|FAILED|ERROR) .*test_module\.py::(\S+)", done.stdout, re.MULTILINE
    ):
        outcomes.setdefault(outcome, []).append(name)
    assert outcomes, done.stdout + done.stderr
    return outcomes
