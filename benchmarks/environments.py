"""Virtual environments for the peers, which are kept for later runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

from benchmarks.rows import Client

HERE: Final = Path(__file__).parent
CACHE: Final = HERE / ".cache"


class MissingError(Exception):
    """A client that cannot run here. The message states what to install."""


def requirements(environment: str) -> list[str]:
    """Return the requirements of an environment."""
    pins = tomllib.loads((HERE / "pins.toml").read_text())
    return list(pins[environment]["requirements"])


def python_of(client: Client) -> str:
    """
    Return the interpreter that runs a client, creating its environment if necessary.

    :raises MissingError: if a system tool or uvloop is missing, which are not installed here
    """
    if client.program and shutil.which(client.program) is None:
        raise MissingError(
            f"{client.name}: {client.program} is not installed; install the Debian packages "
            "'mosquitto' and 'mosquitto-clients'"
        )
    if client.ours and client.uvloop:
        try:
            import uvloop  # noqa: F401 - checks whether it is installed
        except ImportError:
            raise MissingError(f"{client.name}: uvloop is not installed; install uvloop") from None
    return _make(client.environment) if client.environment else sys.executable


def _make(environment: str) -> str:
    wanted = requirements(environment)
    mark = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:8]
    home = CACHE / f"{environment}-{mark}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        print(f"creating the environment of {environment}: {', '.join(wanted)}", file=sys.stderr)
        if uv := shutil.which("uv"):
            _run(uv, "venv", "--quiet", "--python", sys.executable, str(home))
            _run(uv, "pip", "install", "--quiet", "--python", str(python), *wanted)
        else:
            _run(sys.executable, "-m", "venv", str(home))
            _run(str(python), "-m", "pip", "install", "--quiet", *wanted)
        (home / "complete").touch()
    return str(python)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise MissingError(f"{' '.join(command)} failed: {done.stderr.strip()}")
