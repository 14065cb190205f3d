"""
Detect secrets that the library shows while a test runs.

Keys, passwords and licences are collected where the library first gets them. Log lines are recorded
when they are logged; values and errors when they are finalized, because by then they have their
causes and notes. At the end of the test, the recorded text is searched for the secrets.
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

_MIN_SECRET_LENGTH: Final = 8
"""A shorter secret might occur in a text by chance."""

_MAX_VALUES_PER_CLASS: Final = 500
"""The number of values of one class that are inspected per test."""

_LOGGERS: Final = tuple(
    map(logging.getLogger, ("emitter_anyio", "emitter_anyio.testing", "asyncio"))
)

_WATCHER_LEVEL: Final = 1
"""A level that enables every record and that no test sets."""

_active: SecretWatcher | None = None
"""The watcher of the running test."""


class SecretWatcher(logging.Filter):
    """Collects secrets, and the text that is shown: as a logging filter, at every level."""

    def __init__(self) -> None:
        super().__init__()
        self._secrets: set[str] = set()
        self._shown: dict[str, str] = {}
        self._inspected: Counter[type] = Counter()

    def start(self) -> None:
        """Start recording log lines and what the hooks report."""
        global _active  # noqa: PLW0603 - hooks in classes have nowhere else to look
        _install()
        for logger in _LOGGERS:
            logger.setLevel(_WATCHER_LEVEL)
            logger.addFilter(self)
        _active = self

    def stop(self) -> None:
        """Inspect the values that are still alive, and stop recording."""
        global _active  # noqa: PLW0603 - hooks in classes have nowhere else to look
        for value in gc.get_objects():
            if type(value) in _watched:
                self.inspect(value)
        for logger in _LOGGERS:
            logger.removeFilter(self)
            logger.setLevel(logging.NOTSET)
        _active = None

    def filter(self, record: logging.LogRecord) -> bool:
        where = f"a log line of {record.name!r}"
        self.record(where, f"{record.getMessage()} {record.__dict__}")
        if record.exc_info and record.exc_info[1] is not None:
            self.record(where, " ".join(visible_text(record.exc_info[1])))
        # Handlers get only the records that they would get without the watcher.
        own_level = logging.getLogger(record.name).level == _WATCHER_LEVEL
        return not own_level or record.levelno >= logging.getLogger().level

    def add_secrets(self, *secrets: object) -> None:
        """Add secrets to search for."""
        for secret in secrets:
            if isinstance(secret, str) and len(secret) >= _MIN_SECRET_LENGTH:
                self._secrets |= {secret, quote(secret, safe="")}

    def record(self, where: str, text: str) -> None:
        """Record text that was shown."""
        self._shown[text] = where

    def inspect(self, value: object) -> None:
        """Record the ``repr()`` and ``str()`` of a value; for an error, all its visible text."""
        kind = type(value)
        self._inspected[kind] += 1
        if self._inspected[kind] <= _MAX_VALUES_PER_CLASS:
            texts = [f"{value!r} {value}"]
            if isinstance(value, BaseException):
                texts = [*visible_text(value)]
            self.record(f"an object of {kind.__qualname__}", " ".join(texts))

    def leaks(self) -> list[str]:
        """Return where secrets were shown, and the text without the secrets."""
        found = []
        for text, where in self._shown.items():
            redacted = text
            for secret in sorted(self._secrets, key=len, reverse=True):
                redacted = redacted.replace(secret, "<a secret>")
            if redacted != text:
                found.append(f"{where} shows a secret: {redacted}")
        return found


def visible_text(error: BaseException) -> Iterator[str]:
    """
    Iterate over the text of an error, its causes, its contexts and the members of its groups.

    The text is the message and the attributes, notes included. ``traceback`` is not used because it
    would show the test's own source lines, which contain its literals.
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
    """Hook into the library permanently. The hooks do nothing while no watcher is active."""
    if _watched:
        return

    from emitter_anyio import ChannelKey, EmitterError, Will
    from emitter_anyio._net.options import Options
    from emitter_anyio._values.channels import check_key
    from emitter_anyio.testing import Broker

    _after(ChannelKey, "__init__", lambda value, _: (value.key,))
    _after(Will, "__init__", lambda value, _: (value.key,))
    _after(Options, "__init__", lambda value, _: (value.password,))
    _after(Broker, "__init__", lambda value, _: (value.secret_key, value.license))
    _after(Broker, "keygen", lambda _, key: (key,))

    @functools.wraps(check_key)
    def check_and_collect(key: str) -> str:
        if _active is not None:
            _active.add_secrets(key)
        return check_key(key)

    for name, module in list(sys.modules.items()):
        if not name.startswith("emitter_anyio"):
            continue
        if getattr(module, "check_key", None) is check_key:
            vars(module)["check_key"] = check_and_collect
        if not name.startswith("emitter_anyio.testing"):
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__.startswith("emitter_anyio"):
                    _watch(value)
    _watch(EmitterError)
    EmitterError.__del__ = _inspect_finalized  # type: ignore[attr-defined]  # does not define one


def _watch(kind: type) -> None:
    own = "__repr__" in vars(kind) and not issubclass(kind, Enum)
    if own and kind not in _watched:
        finalize = getattr(kind, "__del__", None)
        look = _inspect_finalized if finalize is None else _inspect_before(finalize)
        kind.__del__ = look  # type: ignore[attr-defined]  # most do not define one
    if own or issubclass(kind, BaseException):
        _watched[kind] = None


def _inspect_before(finalize: Callable[[object], None]) -> Callable[[object], None]:
    def inspect_finalized(value: object) -> None:
        _inspect_finalized(value)
        finalize(value)

    return inspect_finalized


def _inspect_finalized(value: object) -> None:
    if _active is not None:
        try:
            _active.inspect(value)
        except AttributeError:
            # __init__() raised before it set every attribute.
            return


def _after(kind: type, name: str, secrets: Callable[[Any, Any], tuple[object, ...]]) -> None:
    """Wrap a method so that the secrets of its object or its result are collected."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def wrapper(self: object, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if _active is not None:
            _active.add_secrets(*secrets(self, result))
        return result

    setattr(kind, name, wrapper)
