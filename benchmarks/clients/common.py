"""What the programs of all clients share: what they are asked to do, and how they measure it."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

HOST: Final = "127.0.0.1"

SETTLING: Final = 0.5
"""Seconds that links are left alone before their idling is measured."""

Figures: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Job:
    """
    What a client is asked to do.

    :ivar case: a key of what the program gives to :func:`main`
    :ivar variant: of the client, where there are several: which event loop, or which of its ways
    :ivar payload: bytes of each message
    :ivar subscriptions: channels subscribed to
    :ivar ca: file of the authority that the peer's certificate is of: speak TLS
    :ivar seconds: how long idle links are watched
    """

    case: str
    variant: str = ""
    port: int = 0
    messages: int = 0
    payload: int = 64
    subscriptions: int = 1
    in_flight: int = 1
    links: int = 0
    seconds: float = 10.0
    ca: str | None = None
    websocket: bool = False

    @property
    def context(self) -> ssl.SSLContext | None:
        """What TLS is spoken with."""
        return None if self.ca is None else ssl.create_default_context(cafile=self.ca)

    @property
    def body(self) -> bytes:
        """The payload of every message."""
        return b"x" * self.payload


Case: TypeAlias = Callable[[Job], Figures]


class Meter:
    """The clock, and the processor time of this process with all its threads."""

    def __init__(self) -> None:
        self.seconds = self.processor = self._clock = self._used = 0.0

    def start(self) -> None:
        self._used = processor()
        self._clock = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._clock
        self.processor = processor() - self._used

    def figures(self, messages: int) -> Figures:
        """The rate of so many messages, and what each has cost."""
        return {"rate": messages / self.seconds, "cpu_us": self.processor / messages * 1e6}


class Countdown:
    """
    Measures from the first message that a callback gets to the last one.

    :ivar take: to be called with each payload
    """

    def __init__(self, job: Job, done: Callable[[], object]) -> None:
        self._meter = meter = Meter()
        self._messages = messages = job.messages
        left, size, first = messages, 0, messages - 1

        def take(body: bytes) -> None:
            nonlocal left, size
            left -= 1
            size += len(body)
            if left == first:
                meter.start()
            if not left:
                meter.stop()
                check_size(job, size)
                done()

        self.take: Callable[[bytes], None] = take

    def figures(self) -> Figures:
        """The rate, and what each message has cost."""
        return self._meter.figures(self._messages)


def check_size(job: Job, size: int) -> None:
    """Give up if the bytes that came are not those that were sent."""
    if size != job.messages * job.payload:
        raise SystemExit(f"{size} bytes came instead of {job.messages * job.payload}")


def percentiles(seconds: Sequence[float]) -> Figures:
    """The median and the 99th percentile, in µs."""
    ordered = sorted(seconds)
    return {
        "p50_us": ordered[len(ordered) // 2] * 1e6,
        "p99_us": ordered[len(ordered) * 99 // 100] * 1e6,
    }


@dataclass(frozen=True)
class Idling:
    """What some links did while nobody used them."""

    seconds: float
    processor: float
    pings: float


def idle_figures(quiet: Idling, pinging: Idling) -> Figures:
    """
    What idle links cost beside pings, and what each ping costs.

    :param quiet: of links whose keepalive is longer than the measurement
    :param pinging: of links whose keepalive is short
    """
    if quiet.pings:
        raise SystemExit("links that were to be idle have sent pings")
    if not pinging.pings:
        raise SystemExit("links that were to send pings have sent none")
    share = quiet.processor / quiet.seconds
    return {
        "idle_ms": share * 10e3,
        "ping_us": (pinging.processor - share * pinging.seconds) / pinging.pings * 1e6,
    }


def memory() -> int:
    """Bytes that this process has in memory now; its peak is counted anew from here on."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that it had in memory since :func:`memory` was called."""
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: the peak of its whole life is all there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def still_busy(seconds: float = 30.0) -> Callable[[], bool]:
    """Make a function that tells, each time it is asked, if work was done since the last time."""
    end = time.monotonic() + seconds
    last = -1.0

    def ask() -> bool:
        nonlocal last
        before, last = last, processor()
        return last - before >= 0.01 and time.monotonic() < end

    return ask


def ask_peer(port: int) -> dict[str, float]:
    """Ask the peer what it has counted; only one that serves many links answers."""
    with socket.create_connection((HOST, port)) as sock:
        sock.sendall(b"STAT")
        return dict(json.loads(sock.recv(4096)))


def processor() -> float:
    """Seconds of processor that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(cases: dict[str, Case], module: str) -> None:
    """
    Run the case that the arguments ask for.

    :param cases: what this client can
    :param module: what its users import
    """
    job = Job(**json.loads(sys.argv[1]))
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if job.case == "import":
        print(json.dumps(importing(module, job.messages)))
    else:
        print(json.dumps(cases[job.case](job)))


def importing(module: str, times: int) -> Figures:
    """What an import adds to the start of the interpreter."""
    seconds: dict[str, list[float]] = {f"import {module}": [], "pass": []}
    for _ in range(times):
        for program, taken in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            taken.append(time.perf_counter() - start)
    imported, bare = map(statistics.median, seconds.values())
    return {"import_ms": (imported - bare) * 1000}
