"""One run: a peer and a client, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.rows import Client, Row

ROOT: Final = Path(__file__).parents[1]

_TIMEOUT: Final = 180


@dataclass(frozen=True)
class Certificate:
    """Files for TLS on loopback."""

    chain: str
    key: str
    authority: str

    @classmethod
    def make(cls, directory: Path) -> Certificate:
        """Make them with trustme."""
        import trustme

        authority = trustme.CA()
        made = authority.issue_cert("127.0.0.1", "localhost")
        files = cls(*(str(directory / name) for name in ("chain.pem", "key.pem", "ca.pem")))
        made.private_key_pem.write_to_path(files.key)
        for number, blob in enumerate(made.cert_chain_pems):
            blob.write_to_path(files.chain, append=number > 0)
        authority.cert_pem.write_to_path(files.authority)
        return files


class RunFailedError(Exception):
    """A run gave no figures; says why."""


def run(
    row: Row,
    client: Client,
    python: str,
    messages: int,
    certificate: Certificate | None = None,
    **more: Any,
) -> dict[str, float]:
    """
    Measure once.

    :param python: the interpreter that has the client
    :param messages: of how many messages; a client whose ``share`` is smaller gets fewer
    :param more: what else the client is told
    :raises RunFailedError: if it gave no figures
    """
    scaled = row.mode in ("blast", "sink") and row.case != "stalled"
    messages = max(1, round(messages * client.share)) if scaled else messages
    said: dict[str, Any] = {"messages": messages, **row.job, **more}
    if row.case == "stalled" and client.ours:
        said["subscriptions"] = 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if certificate is not None:
        said["ca"] = environment["SSL_CERT_FILE"] = certificate.authority
    said |= {"case": row.case, "variant": client.variant, "websocket": row.needs == "websocket"}
    command = [python, "-m", f"benchmarks.clients.{client.module}"]
    if row.mode == "none":
        return _figures(command, said, environment)

    part = row.part(messages, said.get("subscriptions", 1))
    if certificate is not None:
        part = replace(part, certificate=(certificate.chain, certificate.key))
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peer", json.dumps(asdict(part))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as peer:
        assert peer.stdout is not None
        try:
            said["port"] = int(peer.stdout.readline())
            figures = _figures(command, said, environment)
        finally:
            counted = json.loads(peer.communicate()[0] or "{}")
    if not client.python:
        # It cannot say how long it took; the peer can.
        figures["rate"] = messages / counted["seconds"]
    return figures


def _figures(
    command: list[str], said: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, float]:
    try:
        done = subprocess.run(
            [*command, json.dumps(said)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            cwd=ROOT,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"took more than {_TIMEOUT} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunFailedError(lines[-1])
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures
