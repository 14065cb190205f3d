"""The signatures of the public names, as type checkers and ``help()`` see them."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable, Iterator
from typing import Any, Final, get_args, get_overloads, get_type_hints

import pytest

import emitter_anyio
import emitter_anyio.outbox
import emitter_anyio.testing
from emitter_anyio import Backoff, ChannelKey, ConnectOptions, Emitter, connect
from emitter_anyio._net.options import _ADDRESS_CHECKS, _OTHER_CHECKS

SPECIAL: Final = ("__init__", "__aenter__", "__aexit__", "__aiter__", "__anext__", "__call__")
MADE_BY_METHODS: Final = (
    "Emitter",
    "Entering",
    "Subscribing",
    "EventStream",
    "PresenceFeed",
    "Client",
)
"""Classes whose constructors are private."""
JSON: Final = ("as_object", "asObject")
"""Methods that return any JSON value."""


def public_values() -> Iterator[object]:
    for module in (emitter_anyio, emitter_anyio.outbox, emitter_anyio.testing):
        yield from (value for name, value in vars(module).items() if not name.startswith("_"))


def functions_of(cls: type) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield the public functions that a class defines, and the getters of its properties."""
    for name, value in vars(cls).items():
        if name.startswith("_") and name not in SPECIAL:
            continue
        if isinstance(value, property):
            assert value.fget is not None
            yield name, value.fget
        elif inspect.isfunction(value):
            yield name, value


def public_functions() -> Iterator[tuple[str, Callable[..., object]]]:
    for value in public_values():
        if inspect.isfunction(value):
            yield value.__name__, value
        elif inspect.isclass(value):
            for name, function in functions_of(value):
                if name == "__init__" and value.__name__ in MADE_BY_METHODS:
                    continue
                yield f"{value.__name__}.{name}", function


FUNCTIONS: Final = dict(public_functions())


def contains_any(annotation: object) -> bool:
    return annotation is Any or any(map(contains_any, get_args(annotation)))


def test_walk_finds_the_public_functions() -> None:
    assert {"connect", "Emitter.publish", "Emitter.state", "Broker.__init__"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_any_in_a_public_signature(name: str) -> None:
    function = FUNCTIONS[name]
    for each in (function, *get_overloads(function)):
        hints = get_type_hints(each)
        found = {argument for argument, hint in hints.items() if contains_any(hint)}
        assert found == ({"return"} if name.rpartition(".")[2] in JSON else set())


class TestConnect:
    def test_options_have_types(self) -> None:
        hints = get_type_hints(ConnectOptions)
        assert hints.keys() == {*_ADDRESS_CHECKS, *_OTHER_CHECKS}
        assert not any(map(contains_any, hints.values()))

    def test_signature_names_the_options(self) -> None:
        shown = str(inspect.signature(connect))
        names = ", ".join(f"{name}=..." for name in get_type_hints(ConnectOptions))
        options = "options: 'Mapping[str, object] | str | None' = None"
        assert shown == f"({options}, /, *, {names}) -> 'Emitter'"

    def test_help_shows_and_explains_the_options(self) -> None:
        shown = pydoc.plain(pydoc.render_doc(connect))
        for name in get_type_hints(ConnectOptions):
            assert f"{name}=..." in shown
            assert f"``{name}``: " in shown


class TestWrongUse:
    async def test_await_shows_what_to_write(self, anyio_backend: object) -> None:
        client: Any = connect("mqtt://h")
        with pytest.raises(TypeError, match=r"await.* 'async with connect\(\.\.\.\) as emitter:'"):
            await client

    def test_with_shows_what_to_write(self) -> None:
        client: Any = connect("mqtt://h")
        with pytest.raises(TypeError, match=r"with'.* 'async with connect\(\.\.\.\) as emitter:'"):
            with client:
                pytest.fail("it was entered")  # pragma: no cover
        client.__exit__(None, None, None)


async def mistakes(client: Emitter) -> None:
    """
    Use the client in ways that type checkers reject. It is never called.

    The type checkers report an error that is expected here and missing.
    """
    await client  # type: ignore[misc]
    with client:  # type: ignore[attr-defined]
        pass
    connect("mqtt://h", bogus=1)  # type: ignore[call-arg]
    connect("mqtt://h", keepalive="soon")  # type: ignore[arg-type]
    connect("mqtt://h", reconnect=True)  # type: ignore[arg-type]
    connect("mqtt://h", while_down="sleep")  # type: ignore[arg-type]
    connect(host=b"h")  # type: ignore[arg-type]
    connect(["mqtt://h"])  # type: ignore[arg-type]
    await client.publish(5, "a/", "x")  # type: ignore[arg-type]
    await client.publish(lambda: "key", "a/", "x")  # type: ignore[arg-type,return-value]


async def right_uses(client: Emitter, key: ChannelKey) -> None:
    """Use the client in ways that type checkers accept. It is never called."""

    async def get_key() -> ChannelKey:
        return key

    options: ConnectOptions = {"host": "h", "secure": False, "reconnect": False}
    connect(options)
    connect(**options)
    connect("ws://h", reconnect=Backoff(tries=3), servers=None)
    await client.publish(key, "a/", "x")
    await client.publish(get_key, "a/", "x")
