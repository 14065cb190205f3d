"""The collections that a client holds, to find entries that were not removed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final
from weakref import WeakSet

from emitter_anyio import Emitter

_CACHES: Final = {
    "KeyRing._known",
    "Publisher._topics",
    "Router._found",
    "Router.receivers",
    "Routes._others",
    "Supervisor._restorers",
    "_Node.below",
}
"""Bounded caches, and constants: their entries are not leaks."""


def tables(emitter: Emitter) -> dict[str, list[Any]]:
    """
    Return the contents of the collections in a client and its parts, by class and attribute.

    Empty collections and those in ``_CACHES`` are left out.
    """
    found: dict[str, list[Any]] = {}
    for name, table in _walk(emitter, set()):
        if table and name not in _CACHES:
            found.setdefault(name, []).extend(table)
    return found


def _walk(thing: object, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    attributes = dict(getattr(thing, "__dict__", {}))
    for slot in getattr(type(thing), "__slots__", ()):
        if hasattr(thing, slot):
            attributes[slot] = getattr(thing, slot)
    for name, value in attributes.items():
        if isinstance(value, dict | list | set | deque | WeakSet):
            yield f"{type(thing).__name__}.{name}", value
            for inner in value.values() if isinstance(value, dict) else value:
                yield from _walk_ours(inner, seen)
        else:
            yield from _walk_ours(value, seen)


def _walk_ours(value: object, seen: set[int]) -> Iterator[tuple[str, Any]]:
    module = type(value).__module__
    # An event loop with virtual time belongs to emitter_anyio.testing, and not to the client.
    ours = module.startswith("emitter_anyio") and not module.startswith("emitter_anyio.testing")
    if ours and not isinstance(value, Exception):
        yield from _walk(value, seen)
