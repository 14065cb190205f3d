"""How a message becomes a line: text, JSON or hex."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from datetime import datetime
from typing import Any, Final, Protocol

from ._output import STEERING, visible
from ._painting import painter

FORMATS: Final = ("text", "json", "hex")


class Readable(Protocol):
    """A message, live or stored."""

    @property
    def channel(self) -> str:
        """The channel it was published to."""
        ...

    @property
    def binary(self) -> bytes:
        """The payload."""
        ...


def add_format(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say how messages are printed."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=default,
        help="text: the payload as it is; json: an object on each line, with time, channel and "
        "payload (payload_base64 if it is no UTF-8); hex (default: %(default)s)",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="in text and hex, put the channel before the payload; on a terminal it always is",
    )


class Formatter:
    """
    Makes lines of messages.

    :param arguments: with what :func:`add_format` has added
    :param terminal: whether the lines go to a terminal
    """

    def __init__(self, arguments: argparse.Namespace, *, terminal: bool) -> None:
        self._format: str = arguments.format
        self._terminal = terminal
        self._channel = arguments.verbose or terminal
        self._paint = painter(sys.stdout)

    def line(self, message: Readable, time: datetime, **more: Any) -> bytes:
        """Make a line, with its end."""
        if self._format == "json":
            line = to_json({"time": stamp(time), **described(message), **more})
            return f"{line}\n".encode()
        payload = message.binary.hex().encode() if self._format == "hex" else message.binary
        if self._terminal:
            payload = visible(payload.decode(errors="backslashreplace")).encode()
        if not self._channel:
            return payload + b"\n"
        channel = self._paint(visible(message.channel), "cyan")
        return f"{channel} ".encode() + payload + b"\n"


def described(message: Readable) -> dict[str, Any]:
    """Give a message's channel and payload as JSON can hold them."""
    try:
        return {"channel": message.channel, "payload": message.binary.decode()}
    except UnicodeDecodeError:
        encoded = base64.b64encode(message.binary).decode()
        return {"channel": message.channel, "payload_base64": encoded}


def to_json(value: dict[str, Any]) -> str:
    """Put an object on one line, in which nothing could steer a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def stamp(time: datetime) -> str:
    """Write a time as JSON has it, in UTC."""
    return time.isoformat().replace("+00:00", "Z")
