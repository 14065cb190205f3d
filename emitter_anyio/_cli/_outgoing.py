"""The messages that ``pub`` publishes: repeated, the lines of the input, or recorded."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import datetime
from typing import NamedTuple, TypeAlias

import anyio
from anyio import sleep_until

from emitter_anyio._values.channels import check_channel
from emitter_anyio._values.router import reaches

from ._arguments import CommandError
from ._input import STDIN, lines
from ._output import counted, hint, is_terminal, note

Advance: TypeAlias = Callable[[int], None]
"""Advances a progress bar by a number of steps."""


class Outgoing(NamedTuple):
    """A message to publish."""

    channel: str
    binary: bytes


def _ignore(steps: int) -> None:
    """Do nothing, without a progress bar."""


async def repeated(
    message: Outgoing, number: float, advance: Advance = _ignore
) -> AsyncGenerator[Outgoing]:
    """Yield a message a number of times, which can be infinite."""
    done = 0
    while done < number:
        done += 1
        yield message
        advance(1)


async def each_line(channel: str, advance: Advance = _ignore) -> AsyncGenerator[Outgoing]:
    """Yield the lines of standard input."""
    if is_terminal(sys.stdin):
        hint("publishing each line as a message; press Ctrl-D to finish")
    async with aclosing(lines()) as read:
        async for line in read:
            yield Outgoing(channel, line)
            advance(len(line) + 1)


async def recorded(
    name: str, channel: str, speed: float | None, advance: Advance
) -> AsyncGenerator[Outgoing]:
    """
    Yield recorded messages, with the times between them.

    :param name: the file, or ``-`` for standard input
    :param channel: the messages of this channel and of the channels below it are yielded
    :param speed: the factor by which the times are shorter; 0 for no waiting; ``None`` for 1
    :raises CommandError: if the input cannot be read, or a line is not a message
    """
    label = "standard input" if name == STDIN else name
    factor = 1 if speed is None else speed
    begin: tuple[float, float] | None = None
    skipped = 0
    async with aclosing(lines(name)) as read:
        number = 0
        async for line in read:
            number += 1
            if line.strip():
                try:
                    time, message = _parse_record(line)
                except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                    # The message omits the line, which might contain a secret.
                    raise CommandError(
                        f"cannot replay {label}: line {number} is not a message that "
                        "'sub --format json' or 'history' printed"
                    ) from None
                if reaches(channel, message.channel):
                    now = anyio.current_time()
                    began, first = begin = begin or (now, time)
                    if factor:
                        await sleep_until(began + (time - first) / factor)
                    yield message
                else:
                    skipped += 1
            advance(len(line) + 1)
    if skipped:
        note(f"skipped {counted(skipped, 'message')} of other channels")


def _parse_record(line: bytes) -> tuple[float, Outgoing]:
    record = json.loads(line)
    if "payload" in record:
        payload = str.encode(record["payload"])
    else:
        payload = base64.b64decode(record["payload_base64"], validate=True)
    time = datetime.fromisoformat(record["time"]).timestamp()
    return time, Outgoing(check_channel(record["channel"]), payload)


async def spaced(
    messages: AsyncGenerator[Outgoing], interval: float | None
) -> AsyncGenerator[Outgoing]:
    """Yield messages with at least this number of seconds between them."""
    due = 0.0
    async with aclosing(messages):
        async for message in messages:
            if interval is not None:
                await sleep_until(due)
                due = anyio.current_time() + interval
            yield message
