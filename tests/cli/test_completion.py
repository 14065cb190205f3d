"""``completion``, in bash. ``tests/shells.py`` tests the other shells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from emitter_anyio._cli._commands import COMMANDS
from tests.cli.conftest import Cli
from tests.support.shells import SHELLS, complete

# What is typed, and the arguments with which the command runs.
COMPLETIONS = {
    "a command": ("histo\t", "history"),
    "an option": ("pub chat/ --ret\t", "pub chat/ --retain"),
    "a value": ("sub chat/ --format he\t", "sub chat/ --format hex"),
    "an option of bench": ("bench --conn\t", "bench --connections"),
    "a choice of bench": ("bench conn\t", "bench connect"),
    "an option of top": ("top --js\t", "top --json"),
    "a value of every command": ("demo --backend tr\t", "demo --backend trio"),
    "a file": ("me --cafile author\t", "me --cafile authorities.pem"),
    "a positional argument": ("completion fi\t", "completion fish"),
}


def completed_in(shell: str, cli: Cli, directory: Path) -> dict[str, str]:
    """Type each line in a shell, and return the arguments with which it ran."""
    script = directory / "script"
    script.write_text(cli("completion", shell).output)
    (directory / "authorities.pem").touch()
    ran = complete(shell, script, [typed for typed, _ in COMPLETIONS.values()], directory)
    return dict(zip(COMPLETIONS, ran, strict=True))


EXPECTED = {what: expected for what, (_, expected) in COMPLETIONS.items()}


def test_bash_completes_what_is_typed(cli: Cli, tmp_path: Path) -> None:
    assert completed_in("bash", cli, tmp_path) == EXPECTED


@pytest.mark.parametrize("shell", SHELLS)
def test_script_contains_all_commands(cli: Cli, shell: str, backend: str) -> None:
    done = cli("completion", shell, "--backend", backend)
    assert (done.code, done.errors) == (0, "")
    assert all(name in done.output for name in COMMANDS)


def test_missing_shtab_is_reported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    done = cli("completion", "bash")
    assert (done.code, done.output) == (1, "")
    assert "pip install '.[cli]'" in done.error


def test_unknown_shell_is_rejected(cli: Cli) -> None:
    done = cli("completion", "tcsh")
    assert done.code == 2
    assert "bash" in done.error
