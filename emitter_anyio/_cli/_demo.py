"""The command ``demo``."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import anyio

from emitter_anyio import ConnectError, Emitter, EmitterMessage, PresenceEvent, connect

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, CommandError, Parser, UsageError
from ._output import print_line
from ._presence import VERBS, name


def add_demo(parser: Parser) -> None:
    """Add the arguments of ``demo``."""
    parser.set_command(
        _demo,
        description=(
            "Generate a key, publish and receive messages, and watch presence.\n\n"
            "Each step prints one line. Without --url, the demo starts a development broker.\n\n"
            f"{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --backend trio\n"
            "  EMITTER_SECRET=... %(prog)s --url mqtt://127.0.0.1:8080"
        ),
    )
    parser.add_argument(
        "--url",
        type=arguments_.url,
        help="broker to use, such as mqtt://HOST:PORT or wss://HOST",
    )
    parser.add_argument("--secret", help="secret key of that broker (EMITTER_SECRET)")
    parser.add_argument(
        "--timeout",
        type=arguments_.duration,
        default=30,
        metavar="SEC",
        help="maximum duration (default: 30s)",
    )


async def _demo(arguments: argparse.Namespace) -> None:
    url: str | None = arguments.url
    secret: str = arguments.secret or os.environ.get("EMITTER_SECRET", "")
    if url is None and arguments.secret is not None:
        raise UsageError("--secret requires --url")
    if url is not None and not secret:
        raise UsageError("--url requires --secret or EMITTER_SECRET")
    # A failure is raised and reported in one line; the log would report it again.
    logging.getLogger("emitter_anyio").addHandler(logging.NullHandler())
    with anyio.move_on_after(arguments.timeout):
        async with AsyncExitStack() as stack:
            if url is None:
                from emitter_anyio.testing import Broker

                broker = await stack.enter_async_context(Broker())
                url, secret = broker.url, broker.secret_key
                _print_step("broker", f"started a development broker on {url}")
            try:
                await _run_steps(url, secret)
            except ConnectError as exc:
                raise CommandError(f"{exc}; without --url, the demo starts a broker") from exc
        return
    raise CommandError(
        f"the demo did not finish within {arguments.timeout:g} s: the broker is slow, or does not "
        "store or deliver messages; use a longer --timeout"
    )


def _print_step(step: str, text: str) -> None:
    print_line(f"{step:<12}{text}")


async def _run_steps(url: str, secret: str) -> None:
    # A random name, because other clients of the broker might use the channel demo/.
    channel = f"demo/{secrets.token_hex(3)}/"
    async with _client(url, "alice") as alice:
        _print_step("connect", "alice connected to the broker")
        key = (await alice.keygen(secret, channel, "rwslp")).key
        _print_step("keygen", f"a key for {channel} to read, write, store, load and see presence")
        for text in ("the kettle is on", "tea is ready"):
            await alice.publish(key, channel, text, ttl=60, qos=1)
            _print_step("publish", f"{text!r}, stored for 60 s; no subscribers yet")
        async with alice.subscribe(key, channel, last=2) as messages:
            _print_step("subscribe", "alice subscribed, requesting the last 2 stored messages")
            for _ in range(2):
                _print_step("message", f"{_describe(await messages.receive())}, replayed")
            await alice.publish(key, channel, {"cups": 1}, qos=1)
            _print_step("publish", "an object as JSON; the broker accepted it (qos=1)")
            _print_step("message", f"{_describe(await messages.receive())}, live")
            async with alice.watch_presence(key, channel) as presence:
                _print_step("presence", _describe_event(await presence.receive()))
                async with _client(url, "bob") as bob, bob.subscribe(key, channel, last=0):
                    _print_step("presence", _describe_event(await presence.receive()))
                    await bob.publish(key, channel, "one for me, please", echo=False)
                    _print_step("message", f"{_describe(await messages.receive())}, from bob")
                _print_step("presence", _describe_event(await presence.receive()))
        seconds = await alice.flush()
        _print_step("flush", f"the broker has read everything (round trip {seconds * 1e3:.1f} ms)")
    _print_step("disconnect", "alice disconnected; the README shows the code for these steps")


def _client(url: str, username: str) -> Emitter:
    # A user name in the URL takes precedence; a second one would be an error.
    options: dict[str, Any] = {} if urlsplit(url).username else {"username": username}
    # The demo reports a lost connection instead of waiting for a new one.
    return connect(url, reconnect=None, **options)


def _describe(message: EmitterMessage) -> str:
    return f"{message.as_string()!r} on {message.channel}"


def _describe_event(event: PresenceEvent) -> str:
    who = ", ".join(map(name, event.who))
    return f"{who} {VERBS[event.event]}"
