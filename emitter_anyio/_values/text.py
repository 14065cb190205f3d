"""Text for messages: text from a peer made safe to display, and counts."""

from __future__ import annotations

from typing import Final

_MAX_CHARACTERS: Final = 200


def make_printable(text: str) -> str:
    """Return text as one line of at most 200 characters, without terminal control characters."""
    line = " ".join(text[: 64 * _MAX_CHARACTERS].split())
    line = line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]}…"
    return "".join(character if character.isprintable() else "?" for character in line)


def format_count(number: int, singular: str, plural: str) -> str:
    """Return a number with the form of a noun that fits it."""
    return f"{number} {singular if number == 1 else plural}"
