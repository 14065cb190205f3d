"""``doctor``: what keeps a client from working, and the way out."""

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
from ._arguments import CommandError, Commands, UsageError, add_command
from ._findings import Report
from ._reaching import reach
from ._rights import RIGHTS, Examination
from ._source import Source, add_source

_ROUND_TRIPS: Final = 5

_AT_ONCE: Final = 100
"""More questions than the broker answers one by one: it writes 60 times a second to a link."""

_BURSTS: Final = 3

_HELD_BACK: Final = 0.3
"""
The pause between two answers of a burst, in seconds, from which on the broker holds answers back.

A slow machine makes the whole burst long, but hardly one pause.
"""

_CLOCK: Final = 2
"""So many seconds between two clocks matter: keys and what is stored live by the broker's."""


def add_doctor(commands: Commands) -> None:
    """Add ``doctor``."""
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        help="find what is wrong between here and the broker",
        description=(
            "Look at everything between here and the broker in turn: name, TCP, TLS, WebSocket, "
            "CONNACK, latency,\nthe broker's flush, each right of the key on the channel, clock. "
            "Each line has a verdict; what is wrong\nhas a way out, and makes the exit code 1.\n\n"
            "What the broker notices: one connection; 5 pings; 100 small questions at once; and "
            "with a key, a status\nof presence, a look at one stored message, a subscription of a "
            "moment (which presence shows to others)\nand, to see whether the key may write, one "
            "message on the channel itself, which is stored for 5 s.\nWhere the key can tell that "
            "somebody is listening there, that message is not published without --probe;\nwith "
            "--no-probe it never is."
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --url mqtts://broker.example --key KEY --channel chat/\n"
            "  %(prog)s --channel chat/ --need rw       # wrong unless the key may do both\n"
            "  %(prog)s --json | jq 'select(.verdict == \"wrong\")'"
        ),
    )
    parser.add_argument(
        "--channel", type=arguments_.channel, help="try what the key may do on this channel"
    )
    parser.add_argument(
        "--need",
        type=_letters,
        default="",
        metavar="LETTERS",
        help="what the key has to be good for, out of r, w, s, l, p and e; the message is "
        "published only for w and s (default: anything)",
    )
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="publish, or do not, to see whether the key may write (default: unless somebody "
        "would get it)",
    )
    parser.add_argument(
        "--timeout",
        type=arguments_.period,
        default=5,
        metavar="SECONDS",
        help="for each step (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, an object on each line")
    add_source(
        parser,
        key="the key to look at",
        secret="the broker's secret: whether it makes keys",
    )


def _letters(text: str) -> str:
    if {*text} - {*RIGHTS}:
        raise argparse.ArgumentTypeError("expected letters out of r, w, s, l, p and e")
    return text


async def _doctor(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.key is not None and arguments.channel is None:
        raise UsageError("--key needs --channel: a key opens a channel")
    if arguments.need and (arguments.channel is None or source.key is None):
        raise UsageError("--need needs --channel, and --key or EMITTER_KEY")
    report = Report(as_json=arguments.json)
    report.add("broker", "ok", f"{_shown(source)}, from {source.origin}")
    try:
        async with reach(source, report, arguments.timeout) as emitter:
            if emitter is not None:
                await _examine(emitter, arguments, report)
    except ConnectionLostError as exc:
        report.add("link", "wrong", str(exc), "what is in the broker's log at this time?")
    if report.wrong:
        raise CommandError(f"something is wrong: {', '.join(report.wrong)}")
    report.close("all is well")


def _shown(source: Source) -> str:
    # Without user and password.
    return str(make_options(source.url, source.options).servers[0])


async def _examine(emitter: Emitter, arguments: argparse.Namespace, report: Report) -> None:
    source: Source = arguments.source
    try:
        await _see_latency(emitter, report)
        await _see_flush(emitter, report)
    except RequestTimeoutError as exc:
        report.add("latency", "wrong", str(exc), "the broker is overloaded, or none of Emitter's")
        return
    if source.secret:
        await _see_secret(emitter, source.secret, arguments.channel or "doctor/", report)
    ahead = None
    if source.key and arguments.channel:
        examination = Examination(
            emitter,
            report,
            source.key,
            arguments.channel,
            needed=arguments.need,
            probe=arguments.probe,
            patience=arguments.timeout,
        )
        await examination.run()
        ahead = examination.ahead
    elif source.key:
        report.add("key", "untried", "which channel is it for?", "--channel says it")
    else:
        report.add("key", "untried", "there is none", "--key or EMITTER_KEY, and --channel")
    _see_clock(ahead, report)


async def _see_latency(emitter: Emitter, report: Report) -> None:
    times = sorted([await emitter.flush() * 1e3 for _ in range(_ROUND_TRIPS)])
    middle = statistics.median(times)
    report.add(
        "latency", "ok", f"{middle:.1f} ms there and back ({times[0]:.1f} to {times[-1]:.1f})"
    )


async def _see_flush(emitter: Emitter, report: Report) -> None:
    # What is last in a burst may happen to be written at once: one burst proves nothing.
    tries = 0
    while True:
        tries += 1
        answered, took, pause = await _ask_at_once(emitter)
        if answered < _AT_ONCE or pause > _HELD_BACK or tries == _BURSTS:
            break
    text = f"{answered} of {_AT_ONCE} questions asked at once were answered within {took:.2f} s"
    if answered < _AT_ONCE:
        report.add("flush", "wrong", text, "the broker is overloaded, or not one of Emitter's")
    elif pause > _HELD_BACK:
        way = "limit.flushRate in its configuration (60 by default) is how often a second it writes"
        report.add("flush", "note", f"{text}: the broker holds back what follows a burst", way)
    else:
        report.add("flush", "ok", text)


async def _ask_at_once(emitter: Emitter) -> tuple[int, float, float]:
    """Return the number of answers, the seconds that all took, and the longest pause in between."""
    answered = 0
    longest = 0.0
    start = last = time.perf_counter()

    async def ask() -> None:
        nonlocal answered, longest, last
        try:
            await emitter.me()
        except EmitterError:
            return
        answered += 1
        now = time.perf_counter()
        longest, last = max(longest, now - last), now

    async with anyio.create_task_group() as tasks:
        for _ in range(_AT_ONCE):
            tasks.start_soon(ask)
    return answered, time.perf_counter() - start, longest


async def _see_secret(emitter: Emitter, secret: str, channel: str, report: Report) -> None:
    try:
        await emitter.keygen(secret, channel, "", ttl=1)
    except (RequestError, RequestTimeoutError, ValueError) as exc:
        report.add("secret", "wrong", str(exc), "the broker prints it when it makes its licence")
    else:
        report.add("secret", "ok", "the broker makes keys with it")


def _see_clock(ahead: float | None, report: Report) -> None:
    if ahead is None:
        way = "a key with p, or with w, s and l, lets the broker tell"
        report.add("clock", "untried", "the broker has not told the time", way)
    elif abs(ahead) <= _CLOCK:
        report.add("clock", "ok", "the broker's agrees with ours, to the second")
    else:
        which = "ahead of" if ahead > 0 else "behind"
        report.add(
            "clock",
            "wrong",
            f"the broker's is {abs(ahead):.0f} s {which} ours",
            "have both set by NTP: keys and stored messages expire by the broker's clock",
        )
