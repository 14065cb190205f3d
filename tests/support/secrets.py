"""Which secrets a test has used, and what the library has shown while it ran.

Keys, passwords and licences are noted where they come in. What is shown is noted where it is made
(log lines) or where it ends (values and errors, which have their causes and notes by then), and
searched when both are known.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Final
from urllib.parse import quote

_SHORTEST: Final = 8
"""What is shorter stands in many a text by chance."""

_ENOUGH: Final = 500
"""So many values of one class are looked at in a test: floods show nothing new."""

_LOGGERS: Final = tuple(
    map(logging.getLogger, ("emitter_anyio", "emitter_anyio.testing", "asyncio"))
)

_OUR_LEVEL: Final = 1
"""Everything, and no level that a test would set."""

_present: Witness | None = None
"""The witness of the test that runs."""


class Witness(logging.Filter):
    """Notes secrets and what is shown; as a filter of loggers, what is logged at any level."""

    def __init__(self) -> None:
        super().__init__()
        self._secrets: set[str] = set()
        self._shown: dict[str, str] = {}
        self._looked_at: Counter[type] = Counter()

    def begin(self) -> None:
        """Notice what is logged, and what the hooks tell."""
        global _present  # noqa: PLW0603 - hooks in classes have nowhere else to look
        _install()
        for logger in _LOGGERS:
            logger.setLevel(_OUR_LEVEL)
            logger.addFilter(self)
        _present = self

    def end(self) -> None:
        """Look at what still lives, and notice nothing more."""
        global _present  # noqa: PLW0603 - hooks in classes have nowhere else to look
        for value in gc.get_objects():
            if type(value) in _watched:
                self.look_at(value)
        for logger in _LOGGERS:
            logger.removeFilter(self)
            logger.setLevel(logging.NOTSET)
        _present = None

    def filter(self, record: logging.LogRecord) -> bool:
        where = f"a log line of {record.name!r}"
        self.note(where, f"{record.getMessage()} {record.__dict__}")
        if record.exc_info and record.exc_info[1] is not None:
            self.note(where, " ".join(shown(record.exc_info[1])))
        # Others get what they would get without us.
        ours = logging.getLogger(record.name).level == _OUR_LEVEL
        return not ours or record.levelno >= logging.getLogger().level

    def keep(self, *secrets: object) -> None:
        """Note secrets."""
        for secret in secrets:
            if isinstance(secret, str) and len(secret) >= _SHORTEST:
                self._secrets |= {secret, quote(secret, safe="")}

    def note(self, where: str, text: str) -> None:
        """Note what was shown."""
        self._shown[text] = where

    def look_at(self, value: object) -> None:
        """Note what a value shows of itself."""
        kind = type(value)
        self._looked_at[kind] += 1
        if self._looked_at[kind] <= _ENOUGH:
            words = shown(value) if isinstance(value, BaseException) else (f"{value!r} {value}",)
            self.note(f"an object of {kind.__qualname__}", " ".join(words))

    def leaks(self) -> list[str]:
        """Where a secret was shown, and how, without the secret."""
        found = []
        for text, where in self._shown.items():
            told = text
            for secret in sorted(self._secrets, key=len, reverse=True):
                told = told.replace(secret, "<a secret>")
            if told != text:
                found.append(f"{where} shows a secret: {told}")
        return found


def shown(error: BaseException) -> Iterator[str]:
    """
    What can be seen of an error: its words, notes and attributes, and those of what is behind it.

    Not as ``traceback`` writes it, since the lines of a test show the literals in them.
    """
    waiting, seen = [error], {id(error)}
    while waiting:
        one = waiting.pop()
        yield f"{one!r} {one} {vars(one)}"
        more = list(one.exceptions) if isinstance(one, BaseExceptionGroup) else []
        more.append(one.__cause__ if one.__suppress_context__ else one.__cause__ or one.__context__)
        for other in more:
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                waiting.append(other)


_watched: dict[type, None] = {}


def _install() -> None:
    """Hook into the library, for good: without a witness the hooks do nothing."""
    if _watched:
        return

    from emitter_anyio import ChannelKey, EmitterError, Will
    from emitter_anyio._net.options import Options
    from emitter_anyio._values.channels import check_key
    from emitter_anyio.testing import Broker

    _after(ChannelKey, "__init__", lambda made, _: (made.key,))
    _after(Will, "__init__", lambda made, _: (made.key,))
    _after(Options, "__init__", lambda made, _: (made.password,))
    _after(Broker, "__init__", lambda made, _: (made.secret_key, made.license))
    _after(Broker, "keygen", lambda _, key: (key,))

    @functools.wraps(check_key)
    def check_and_keep(key: str) -> str:
        if _present is not None:
            _present.keep(key)
        return check_key(key)

    for name, module in list(sys.modules.items()):
        if not name.startswith("emitter_anyio"):
            continue
        if getattr(module, "check_key", None) is check_key:
            vars(module)["check_key"] = check_and_keep
        if not name.startswith("emitter_anyio.testing"):
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__.startswith("emitter_anyio"):
                    _watch(value)
    _watch(EmitterError)
    EmitterError.__del__ = _look_back  # type: ignore[attr-defined]  # it has none of its own


def _watch(kind: type) -> None:
    own = "__repr__" in vars(kind) and not issubclass(kind, Enum)
    if own and kind not in _watched:
        finalize = getattr(kind, "__del__", None)
        look = _look_back if finalize is None else _look_back_before(finalize)
        kind.__del__ = look  # type: ignore[attr-defined]  # most have none
    if own or issubclass(kind, BaseException):
        _watched[kind] = None


def _look_back_before(finalize: Callable[[object], None]) -> Callable[[object], None]:
    def look_back(value: object) -> None:
        _look_back(value)
        finalize(value)

    return look_back


def _look_back(value: object) -> None:
    if _present is not None:
        try:
            _present.look_at(value)
        except AttributeError:
            # Its __init__() raised.
            return


def _after(kind: type, name: str, secrets: Callable[[Any, Any], tuple[object, ...]]) -> None:
    """Have a method tell the secrets in the object, or in what it returns."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def wrapper(self: object, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if _present is not None:
            _present.keep(*secrets(self, result))
        return result

    setattr(kind, name, wrapper)
