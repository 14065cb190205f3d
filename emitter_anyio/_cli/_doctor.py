"""The command ``doctor``."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Final

import anyio

from emitter_anyio import (
    ConnectionLostError,
    Emitter,
    EmitterError,
    RequestError,
    RequestTimeoutError,
)
from emitter_anyio._net.options import make_options

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, Parser, ReportedError, UsageError
from ._cluster_checks import LOG_FIX, ClusterChecks
from ._connection_checks import check_connection
from ._key_checks import PERMISSIONS, KeyChecks
from ._report import Report
from ._source import Source, add_source

_PINGS: Final = 5

_BURST_REQUESTS: Final = 100
"""More requests than the broker answers immediately: it writes 60 times a second to a client."""

_MAX_BURSTS: Final = 3

_GENERATED_KEY_SECONDS: Final = 60

_THROTTLED_PAUSE_SECONDS: Final = 0.3
"""
The shortest pause between two replies of a burst that shows that the broker throttles its writes.

A slow machine makes the whole burst longer, but rarely a single pause.
"""

_CLOCK_TOLERANCE_SECONDS: Final = 2
"""The difference of clocks that is reported: keys and stored messages expire by the broker's."""


def add_doctor(parser: Parser) -> None:
    """Add the arguments of ``doctor``."""
    parser.set_command(
        _doctor,
        description=(
            "Check the connection, the broker and a key, and suggest a fix for each problem.\n\n"
            "Checks in this order: DNS, TCP, TLS, WebSocket, CONNACK, latency, the broker's\n"
            "flush rate, the secret key, whether every node of a cluster answers requests for\n"
            "stored messages, whether keys can be banned, the permissions of the key on the\n"
            "channel, and the clock. The last line is the verdict. The exit code is 1 if a\n"
            "check failed.\n\n"
            "The broker receives one connection, 5 pings, and 100 concurrent requests. With\n"
            "the secret key, the doctor also generates a key that is valid for a minute. On\n"
            "two more connections, it requests stored messages, and lifts the ban of a key\n"
            "that is not banned. With a channel key, it also requests presence and one stored\n"
            "message, and subscribes for a moment, which presence shows to other clients. To\n"
            "check permission w, it publishes one message to the channel, stored for 5\n"
            "seconds. It does not publish with --no-probe, or if --need contains neither w\n"
            "nor s. If presence shows subscribers on the channel, it publishes only with\n"
            "--probe.\n\n"
            f"{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --url mqtts://broker.example\n\n"
            "  # check a key, and require the permissions r and w\n"
            "  %(prog)s --key KEY --channel chat/ --need rw\n\n"
            "  %(prog)s --json | jq 'select(.status == \"failed\")'"
        ),
    )
    parser.add_argument("--channel", type=arguments_.channel, help="channel to check the key on")
    parser.add_argument(
        "--need",
        type=_letters,
        default="",
        metavar="LETTERS",
        help="permissions to require, out of rwslpe",
    )
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="publish a message despite subscribers, or never",
    )
    parser.add_argument(
        "--timeout",
        type=arguments_.period,
        default=5,
        metavar="SEC",
        help="timeout of each step (default: 5s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    add_source(parser, key="channel key to check", secret="secret key to check")


def _letters(text: str) -> str:
    if {*text} - {*PERMISSIONS}:
        raise argparse.ArgumentTypeError("expected letters out of r, w, s, l, p and e")
    return text


async def _doctor(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.key is not None and arguments.channel is None:
        raise UsageError("--key requires --channel, the channel to check the key on")
    if arguments.need and (arguments.channel is None or source.key is None):
        raise UsageError("--need requires --channel, and --key or EMITTER_KEY")
    report = Report(as_json=arguments.json)
    report.add("broker", "ok", f"{_public_url(source)} (from {source.origins['url']})")
    try:
        async with check_connection(source, report, arguments.timeout) as emitter:
            if emitter is not None:
                await _check_client(emitter, arguments, report)
    except ConnectionLostError as exc:
        report.add("connection", "failed", str(exc), LOG_FIX)
    if not report.close():
        raise ReportedError


def _public_url(source: Source) -> str:
    """Return the URL without user and password."""
    return str(make_options(source.url, source.options).servers[0])


async def _check_client(emitter: Emitter, arguments: argparse.Namespace, report: Report) -> None:
    source: Source = arguments.source
    try:
        await _check_latency(emitter, report)
        await _check_flush(emitter, report)
    except RequestTimeoutError as exc:
        report.add("latency", "failed", str(exc), "the broker is overloaded, or is not Emitter")
        return
    channel: str = arguments.channel or "doctor/"
    cluster = ClusterChecks(source, report, arguments.timeout)
    has_cluster = True
    generated = None
    if source.secret:
        generated = await _check_secret(emitter, source.secret, channel, report)
    if source.secret and generated:
        has_cluster = await cluster.check_history(generated, channel)
        await cluster.check_bans(source.secret, generated)
    ahead = reading_key = None
    if source.key and arguments.channel and has_cluster:
        checks = KeyChecks(
            emitter,
            report,
            source.key,
            channel,
            needed=arguments.need,
            probe=arguments.probe,
            delivery_timeout=arguments.timeout,
        )
        await checks.run()
        ahead = checks.ahead
        if checks.can_load:
            reading_key = source.key
    elif not has_cluster:
        report.add("key", "skipped", "the broker would close the connection")
    elif source.key:
        report.add("key", "skipped", "no channel to check it on", "use --channel")
    else:
        report.add("key", "skipped", "no key", "use --key or EMITTER_KEY, and --channel")
    if reading_key and not generated:
        await cluster.check_history(reading_key, channel)
    elif not generated:
        fix = "use the secret key, or a key with permission l and --channel"
        report.add("history", "skipped", "no key to request stored messages with", fix)
    _check_clock(ahead, report)


async def _check_latency(emitter: Emitter, report: Report) -> None:
    times = sorted([await emitter.flush() * 1e3 for _ in range(_PINGS)])
    median = statistics.median(times)
    report.add(
        "latency", "ok", f"{median:.1f} ms per round trip ({times[0]:.1f} to {times[-1]:.1f})"
    )


async def _check_flush(emitter: Emitter, report: Report) -> None:
    # A throttling broker might happen to write the last replies of a burst immediately, so one
    # fast burst proves nothing.
    bursts = 0
    while True:
        bursts += 1
        answered, took, pause = await _send_burst(emitter)
        throttled = pause > _THROTTLED_PAUSE_SECONDS
        if answered < _BURST_REQUESTS or throttled or bursts == _MAX_BURSTS:
            break
    text = f"{answered} of {_BURST_REQUESTS} concurrent requests answered within {took:.2f} s"
    if answered < _BURST_REQUESTS:
        report.add("flush", "failed", text, "the broker is overloaded, or is not Emitter")
    elif throttled:
        fix = (
            "raise limit.flushRate in the broker's configuration (60 writes per second by default)"
        )
        report.add("flush", "note", f"{text}: the broker delays replies after a burst", fix)
    else:
        report.add("flush", "ok", text)


async def _send_burst(emitter: Emitter) -> tuple[int, float, float]:
    """Return the number of replies, the duration of the burst, and the longest pause in it."""
    answered = 0
    longest = 0.0
    start = last = time.perf_counter()

    async def request() -> None:
        nonlocal answered, longest, last
        try:
            await emitter.me()
        except EmitterError:
            return
        answered += 1
        now = time.perf_counter()
        longest, last = max(longest, now - last), now

    async with anyio.create_task_group() as tasks:
        for _ in range(_BURST_REQUESTS):
            tasks.start_soon(request)
    return answered, time.perf_counter() - start, longest


async def _check_secret(emitter: Emitter, secret: str, channel: str, report: Report) -> str | None:
    """Return a key with permission l, or ``None`` if the broker refuses the secret key."""
    try:
        made = await emitter.keygen(secret, channel, "l", ttl=_GENERATED_KEY_SECONDS)
    except (RequestError, RequestTimeoutError, ValueError) as exc:
        report.add("secret", "failed", str(exc), "use the one printed with the broker's licence")
        return None
    report.add("secret", "ok", "the broker generates keys with it")
    return made.key


def _check_clock(ahead: float | None, report: Report) -> None:
    if ahead is None:
        fix = "use a key with permission p, or with w, s and l"
        report.add("clock", "skipped", "the broker's time is unknown", fix)
    elif abs(ahead) <= _CLOCK_TOLERANCE_SECONDS:
        report.add("clock", "ok", "the broker's clock agrees with the local clock")
    else:
        which = "ahead of" if ahead > 0 else "behind"
        report.add(
            "clock",
            "failed",
            f"the broker's clock is {abs(ahead):.0f} s {which} the local clock",
            "synchronize both with NTP: keys and stored messages expire by the broker's clock",
        )
