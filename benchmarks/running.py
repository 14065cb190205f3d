"""A single run: a peer and a client, each in a separate process."""

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

_TIMEOUT_SECONDS: Final = 180


@dataclass(frozen=True)
class Certificate:
    """The files of a certificate for TLS on loopback."""

    chain: str
    key: str
    authority: str

    @classmethod
    def make(cls, directory: Path) -> Certificate:
        """Create a certificate with trustme."""
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
    """A run without figures. The message states the reason."""


@dataclass
class RunningPeer:
    """
    A peer that runs in a separate process.

    :ivar pid: the number of its process
    :ivar counted: the counters of the peer, after it has ended
    """

    port: int
    pid: int
    counted: dict[str, float] = field(default_factory=dict)


@contextmanager
def running_peer(part: Part) -> Iterator[RunningPeer]:
    """Run a peer until the block is left."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peer", json.dumps(asdict(part))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            peer = RunningPeer(int(process.stdout.readline()), process.pid)
            yield peer
        finally:
            output = process.communicate()[0]
        peer.counted = json.loads(output)


def job_and_part(
    row: Row, client: Client, messages: int, certificate: Certificate | None = None, **more: Any
) -> tuple[dict[str, Any], Part]:
    """
    Return the parameters of the client, without the port, and those of the peer.

    :param more: further parameters of the client
    """
    job: dict[str, Any] = {"messages": messages, "case": row.case, "variant": client.variant}
    job |= {**row.job, "websocket": row.needs == "websocket", **more}
    if row.case == "stalled" and client.ours:
        job["subscriptions"] = 2
    part = row.part(messages, job.get("subscriptions", 1))
    if certificate is not None:
        job["ca"] = certificate.authority
        part = replace(part, certificate=(certificate.chain, certificate.key))
    return job, part


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
    Measure a client once.

    :param python: the interpreter in whose environment the client is installed
    :param messages: the number of messages, of which a client gets its ``share``
    :param certificate: the certificate, if the row uses TLS
    :param library: the directory that contains emitter_anyio, if that is the client
    :param more: further parameters of the client
    :return: the figures
    :raises RunFailedError: if the client failed or took too long
    """
    if row.mode in ("blast", "sink") and row.case != "stalled":
        messages = max(1, round(messages * client.share))
    # -P keeps the working directory from the path, where it would precede the library.
    command = [python, "-P", "-m", f"benchmarks.clients.{client.module}"]
    if row.mode == "none":
        return _figures(command, {"case": row.case, "messages": messages}, certificate, library)

    job, part = job_and_part(row, client, messages, certificate, **more)
    with running_peer(part) as peer:
        figures = _figures(command, {**job, "port": peer.port}, certificate, library)
    if not client.python:
        # A system tool does not measure its time, but the peer does.
        figures["rate"] = messages / peer.counted["seconds"]
    return figures


def _figures(
    command: list[str], job: Mapping[str, Any], certificate: Certificate | None, library: Path
) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{library}{os.pathsep}{ROOT}"}
    # Otherwise a checkout would be compiled at each start, unlike installed packages.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if certificate is not None:
        # Some clients only trust the authorities of the system.
        environment["SSL_CERT_FILE"] = certificate.authority
    try:
        done = subprocess.run(
            [*command, json.dumps(job)],
            capture_output=True,
            check=False,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            cwd=ROOT,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"took more than {_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunFailedError(lines[-1])
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures
