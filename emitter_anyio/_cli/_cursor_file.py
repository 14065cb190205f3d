"""A file with the cursor of a consumer, which survives a crash of the program or the machine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from ._arguments import CommandError


class CursorFile:
    """
    A file that contains a cursor and the channel to which it belongs.

    :param name: the name of the file
    :param channel: the channel that is consumed
    """

    def __init__(self, name: str, channel: str) -> None:
        self._name = name
        self._channel = channel

    def load(self) -> str | None:
        """
        Return the cursor, or ``None`` if there is no file.

        :raises CommandError: if the file cannot be read, or belongs to another channel
        """
        try:
            found = json.loads(Path(self._name).read_bytes())
            channel, cursor = found["channel"], found["cursor"]
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise CommandError(f"cannot read {self._name}: {exc.strerror or exc}") from exc
        except (ValueError, TypeError, KeyError, RecursionError):
            channel = cursor = None
        if not isinstance(cursor, str):
            raise CommandError(f"cannot read {self._name}: it is not a cursor file")
        if channel != self._channel:
            # With the cursor of another channel, a consumer would skip messages.
            raise CommandError(
                f"cannot use {self._name}: it is the cursor of another channel; use one file for "
                "each channel"
            )
        return cursor

    def save(self, cursor: str) -> None:
        """
        Replace the file. After a crash, it contains either the previous or the new cursor.

        :raises CommandError: if the file cannot be written
        """
        content = json.dumps({"channel": self._channel, "cursor": cursor})
        path = os.path.realpath(self._name)  # keep a symbolic link
        folder = os.path.dirname(path)
        try:
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".cursor-")
            try:
                with open(descriptor, "w") as file:
                    file.write(f"{content}\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            _sync_folder(folder)
        except OSError as exc:
            raise CommandError(f"cannot write {self._name}: {exc.strerror or exc}") from exc


def _sync_folder(folder: str) -> None:
    # Otherwise a crash of the machine could undo the replacement.
    if sys.platform == "win32":  # pragma: no cover - a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
