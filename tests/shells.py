"""``completion`` in zsh and fish, which the session ``shells`` of nox requires."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import *  # noqa: F403 - its fixtures
from tests.cli.conftest import Cli
from tests.cli.test_completion import EXPECTED, completed_in


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_shell_completes_what_is_typed(cli: Cli, shell: str, tmp_path: Path) -> None:
    assert completed_in(shell, cli, tmp_path) == EXPECTED
