"""One run: a peer and a client, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.peer import Part
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


@dataclass
class RunningPeer:
    """
    A peer in a process of its own.

    :ivar counted: what it has counted, once it has ended
    """

    port: int
    counted: dict[str, float] = field(default_factory=dict)


@contextmanager
def running_peer(part: Part) -> Iterator[RunningPeer]:
    """Have a peer."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peer", json.dumps(asdict(part))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            peer = RunningPeer(int(process.stdout.readline()))
            yield peer
        finally:
            told = process.communicate()[0]
        peer.counted = json.loads(told)


def job_and_part(
    row: Row, client: Client, messages: int, certificate: Certificate | None = None, **more: Any
) -> tuple[dict[str, Any], Part]:
    """
    Work out what the client is told, but for the port, and what the peer does.

    :param more: what else the client is told
    """
    told: dict[str, Any] = {"messages": messages, "case": row.case, "variant": client.variant}
    told |= {**row.job, "websocket": row.needs == "websocket", **more}
    if row.case == "stalled" and client.ours:
        told["subscriptions"] = 2
    part = row.part(messages, told.get("subscriptions", 1))
    if certificate is not None:
        told["ca"] = certificate.authority
        part = replace(part, certificate=(certificate.chain, certificate.key))
    return told, part


def run(
    row: Row,
    client: Client,
    python: str,
    messages: int,
    certificate: Certificate | None = None,
    library: Path = ROOT,
    **more: Any,
) -> dict[str, float]:
    """
    Measure once.

    :param python: the interpreter that has the client
    :param messages: how many messages; a client whose ``share`` is smaller gets fewer
    :param certificate: speak TLS
    :param library: the directory that has the client, if it is ours
    :param more: what else the client is told
    :raises RunFailedError: if it gave no figures
    """
    if row.mode in ("blast", "sink") and row.case != "stalled":
        messages = max(1, round(messages * client.share))
    # Without the working directory on the path, which would come first.
    command = [python, "-P", "-m", f"benchmarks.clients.{client.module}"]
    if row.mode == "none":
        return _figures(command, {"case": row.case, "messages": messages}, certificate, library)

    told, part = job_and_part(row, client, messages, certificate, **more)
    with running_peer(part) as peer:
        figures = _figures(command, {**told, "port": peer.port}, certificate, library)
    if not client.python:
        # It cannot say how long it took; the peer can.
        figures["rate"] = messages / peer.counted["seconds"]
    return figures


def _figures(
    command: list[str], told: Mapping[str, Any], certificate: Certificate | None, library: Path
) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{library}{os.pathsep}{ROOT}"}
    # What pip has installed is compiled; a checkout would be compiled at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if certificate is not None:
        # For clients that know the system's authorities only.
        environment["SSL_CERT_FILE"] = certificate.authority
    try:
        done = subprocess.run(
            [*command, json.dumps(told)],
            capture_output=True,
            check=False,
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
