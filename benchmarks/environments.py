"""A virtual environment for each peer, kept for the next run."""

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
    """A client cannot be run here; says what to install."""


def requirements(environment: str) -> list[str]:
    """What an environment is made of."""
    pins = tomllib.loads((HERE / "pins.toml").read_text())
    return list(pins[environment]["requirements"])


def python_of(client: Client) -> str:
    """
    Find, or make, the interpreter that runs a client.

    :raises MissingError: if something is missing that we do not install
    """
    if client.program and shutil.which(client.program) is None:
        raise MissingError(
            f"{client.name}: {client.program} is not there; the Debian packages are 'mosquitto' "
            "and 'mosquitto-clients' (apt-get install mosquitto-clients)"
        )
    if client.ours and client.uvloop:
        try:
            import uvloop  # noqa: F401 - is it there?
        except ImportError:
            raise MissingError(f"{client.name}: uvloop is not there (pip install uvloop)") from None
    return _made(client.environment) if client.environment else sys.executable


def _made(environment: str) -> str:
    wanted = requirements(environment)
    mark = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:8]
    home = CACHE / f"{environment}-{mark}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        print(f"making the environment of {environment}: {', '.join(wanted)}", file=sys.stderr)
        if uv := shutil.which("uv"):
            _run(uv, "venv", "--quiet", "--python", sys.executable, str(home))
            _run(uv, "pip", "install", "--quiet", "--python", str(python), *wanted)
        else:
            _run(sys.executable, "-m", "venv", str(home))
            _run(str(python), "-m", "pip", "install", "--quiet", *wanted)
        (home / "complete").touch()
    return str(python)


def _run(*command: str) -> None:
    made = subprocess.run(command, capture_output=True, check=False, text=True)
    if made.returncode:
        raise MissingError(f"{' '.join(command)} failed: {made.stderr.strip()}")
