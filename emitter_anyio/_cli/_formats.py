"""The formats of a printed message: text, JSON and hex."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from datetime import datetime
from typing import Any, Final, Protocol

from ._output import CONTROL_CHARACTERS, visible, visible_text
from ._terminal import make_styler

FORMATS: Final = ("text", "json", "hex")

_FORMATS: Final = (
    "Formats: text prints the payload and a line break, hex prints its bytes, json\n"
    "prints an object with time, channel and payload (payload_base64 if it is not\n"
    "UTF-8). --raw prints the exact bytes of each payload, without line breaks."
)

FORMAT_HELP: Final = f"{_FORMATS}\nOn a terminal, text and hex begin with the channel."

REPLY_FORMAT_HELP: Final = f"{_FORMATS}\nNo line break is added to text that ends with one."


class Readable(Protocol):
    """A received or stored message."""

    @property
    def channel(self) -> str:
        """The channel it was published to."""
        ...

    @property
    def binary(self) -> bytes:
        """The payload."""
        ...


def add_format(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options for the format of messages."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=default,
        metavar="FORMAT",
        help="text, json or hex (default: %(default)s)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-v", "--verbose", action="store_true", help="print the channel before the payload"
    )
    group.add_argument(
        "--raw",
        dest="format",
        action="store_const",
        const="raw",
        help="print only the bytes of each payload",
    )


class Formatter:
    """
    Formats messages as lines.

    :param arguments: the arguments that :func:`add_format` added
    :param terminal: whether the lines are written to a terminal
    :param reply: whether the messages are replies: each can have several lines, and their channels
        matter less
    """

    def __init__(
        self, arguments: argparse.Namespace, *, terminal: bool, reply: bool = False
    ) -> None:
        self._format: str = arguments.format
        self._terminal = terminal
        self._reply = reply
        self._channel = arguments.verbose or (terminal and not reply)
        self._style = make_styler(sys.stdout)

    def line(self, message: Readable, time: datetime, **more: Any) -> bytes:
        """
        Format a message as a line, with its line break; a raw message as its bytes.

        :param more: further fields of the JSON object
        """
        if self._format == "raw":
            return message.binary
        if self._format == "json":
            line = to_json({"time": iso_time(time), **message_fields(message), **more})
            return f"{line}\n".encode()
        payload = message.binary.hex().encode() if self._format == "hex" else message.binary
        if self._terminal:
            escape = visible_text if self._reply else visible
            payload = escape(payload.decode(errors="backslashreplace")).encode()
        if not (self._reply and payload.endswith(b"\n")):
            payload += b"\n"
        if not self._channel:
            return payload
        channel = self._style(visible(message.channel), "cyan")
        return f"{channel} ".encode() + payload


def message_fields(message: Readable) -> dict[str, Any]:
    """Return the channel and the payload of a message as JSON values."""
    try:
        return {"channel": message.channel, "payload": message.binary.decode()}
    except UnicodeDecodeError:
        encoded = base64.b64encode(message.binary).decode()
        return {"channel": message.channel, "payload_base64": encoded}


def to_json(value: dict[str, Any]) -> str:
    """Serialize an object to one line, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def iso_time(time: datetime) -> str:
    """Format a UTC time in ISO 8601."""
    return time.isoformat().replace("+00:00", "Z")
