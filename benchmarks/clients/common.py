"""Parameters and measurements that the programs of all clients share."""

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
"""The number of seconds before the measurement of idle connections begins."""

Figures: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Job:
    """
    The parameters of a client's program.

    :ivar case: the name of the case, a key of the mapping that the program passes to :func:`main`
    :ivar variant: the variant of the client, such as its event loop, if there are several
    :ivar payload: the size of each message in bytes
    :ivar subscriptions: the number of channels to subscribe to
    :ivar in_flight: the number of unacknowledged QoS 1 publishes
    :ivar connections: the number of connections
    :ivar seconds: the length of the measurement of idle connections
    :ivar ca: the file of the authority that issued the peer's certificate; without it, no TLS
    """

    case: str
    variant: str = ""
    port: int = 0
    messages: int = 0
    payload: int = 64
    subscriptions: int = 1
    in_flight: int = 1
    connections: int = 0
    seconds: float = 10.0
    ca: str | None = None
    websocket: bool = False

    @property
    def context(self) -> ssl.SSLContext | None:
        """The TLS context, or ``None`` without TLS."""
        return None if self.ca is None else ssl.create_default_context(cafile=self.ca)

    @property
    def body(self) -> bytes:
        """The payload of every message."""
        return b"x" * self.payload


Case: TypeAlias = Callable[[Job], Figures]


class Meter:
    """Measures elapsed time, and the CPU time of all threads of this process."""

    def __init__(self) -> None:
        self.seconds = self.processor = self._clock = self._used = 0.0

    def start(self) -> None:
        self._used = processor()
        self._clock = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._clock
        self.processor = processor() - self._used

    def figures(self, messages: int) -> Figures:
        """Return the rate of a number of messages, and the CPU time of each."""
        return {"rate": messages / self.seconds, "cpu_us": self.processor / messages * 1e6}


class Countdown:
    """
    Measures the time from the first to the last message that a callback gets.

    :param done: called after the last message
    :ivar take: must be called with each payload
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
        """Return the rate, and the CPU time of each message."""
        return self._meter.figures(self._messages)


def check_size(job: Job, size: int) -> None:
    """
    Check the number of received bytes.

    :raises SystemExit: if it differs from the number of bytes sent
    """
    if size != job.messages * job.payload:
        raise SystemExit(f"received {size} bytes instead of {job.messages * job.payload}")


def percentiles(seconds: Sequence[float]) -> Figures:
    """Return the median and the 99th percentile in µs."""
    ordered = sorted(seconds)
    return {
        "p50_us": ordered[len(ordered) // 2] * 1e6,
        "p99_us": ordered[len(ordered) * 99 // 100] * 1e6,
    }


@dataclass(frozen=True)
class Idling:
    """A measurement of idle connections: its length, the CPU time, and the number of pings."""

    seconds: float
    processor: float
    pings: float


def idle_figures(quiet: Idling, pinging: Idling) -> Figures:
    """
    Return the CPU time of idle connections without pings, and the CPU time of each ping.

    :param quiet: the measurement of connections that send no pings
    :param pinging: the measurement of connections that send pings
    """
    if quiet.pings:
        raise SystemExit("idle connections have sent pings")
    if not pinging.pings:
        raise SystemExit("connections with a short keepalive have sent no pings")
    share = quiet.processor / quiet.seconds
    return {
        "idle_ms": share * 10e3,
        "ping_us": (pinging.processor - share * pinging.seconds) / pinging.pings * 1e6,
    }


def memory() -> int:
    """Return the memory of this process in bytes, and begin to measure its peak."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the peak memory in bytes since :func:`memory` was called."""
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # Only Linux has more than the peak since the start of the process.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def still_busy(seconds: float = 30.0) -> Callable[[], bool]:
    """Return a function that returns whether this process has worked since the previous call."""
    end = time.monotonic() + seconds
    last = -1.0

    def check() -> bool:
        nonlocal last
        before, last = last, processor()
        return last - before >= 0.01 and time.monotonic() < end

    return check


def ask_peer(port: int) -> dict[str, float]:
    """Return the counters of a peer in mode ``"many"``."""
    with socket.create_connection((HOST, port)) as sock:
        sock.sendall(b"STAT")
        return dict(json.loads(sock.recv(4096)))


def processor() -> float:
    """Return the CPU time of this process in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(cases: dict[str, Case], module: str) -> None:
    """
    Run the case that the command line names, and print its figures.

    :param cases: the cases of this client, by name
    :param module: the module that users of this client import
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
    """Return the time that an import adds to the start of the interpreter."""
    seconds: dict[str, list[float]] = {f"import {module}": [], "pass": []}
    for _ in range(times):
        for program, taken in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            taken.append(time.perf_counter() - start)
    imported, bare = map(statistics.median, seconds.values())
    return {"import_ms": (imported - bare) * 1000}
