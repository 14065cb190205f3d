"""``demo``: a client at work."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import anyio

from emitter_anyio import ConnectError, Emitter, EmitterMessage, PresenceEvent, connect

from . import _arguments as arguments_
from ._arguments import CommandError, Commands, UsageError, add_command
from ._output import say
from ._presence import VERBS, name


def add_demo(commands: Commands) -> None:
    """Add ``demo``."""
    parser = add_command(
        commands,
        "demo",
        _demo,
        help="see a client at work, in a few seconds",
        description=(
            "Make a key, publish, receive, and watch who comes and goes: a line for each thing "
            "that\nhappens. Without --url a development broker is started for it."
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
        help="a broker that is running, such as mqtt://HOST:PORT or wss://HOST",
    )
    parser.add_argument(
        "--secret",
        help="the secret key of its licence (default: EMITTER_SECRET in the environment; other "
        "users of this machine can see a command line)",
    )
    parser.add_argument(
        "--timeout",
        type=arguments_.seconds,
        default=30,
        metavar="SECONDS",
        help="give up after that (default: %(default)s)",
    )


async def _demo(arguments: argparse.Namespace) -> None:
    url: str | None = arguments.url
    secret: str = arguments.secret or os.environ.get("EMITTER_SECRET", "")
    if url is None and arguments.secret is not None:
        raise UsageError("--secret belongs to the broker of --url: give both or none")
    if url is not None and not secret:
        raise UsageError("--url needs --secret, or EMITTER_SECRET in the environment")
    # What goes wrong is raised, and told in one line: no second one from the log.
    logging.getLogger("emitter_anyio").addHandler(logging.NullHandler())
    with anyio.move_on_after(arguments.timeout):
        async with AsyncExitStack() as stack:
            if url is None:
                from emitter_anyio.testing import Broker

                broker = await stack.enter_async_context(Broker())
                url, secret = broker.url, broker.secret_key
                _tell("broker", f"a development broker listens on {url}")
            try:
                await _story(url, secret)
            except ConnectError as exc:
                raise CommandError(
                    f"{exc}; without --url the demo starts a broker of its own"
                ) from exc
        return
    raise CommandError(
        f"the demo is not done after {arguments.timeout:g} s: the broker is slow, or does not "
        "store or deliver; --timeout gives it longer"
    )


def _tell(what: str, text: str) -> None:
    say(f"{what:<12}{text}")


async def _story(url: str, secret: str) -> None:
    # Nobody else uses this channel, whatever broker it is.
    channel = f"demo/{secrets.token_hex(3)}/"
    async with _named(url, "alice") as alice:
        _tell("connect", "alice has a link to the broker")
        key = (await alice.keygen(secret, channel, "rwslp")).key
        _tell("keygen", f"a key for {channel}: read, write, store, load, presence")
        for text in ("the kettle is on", "tea is ready"):
            await alice.publish(key, channel, text, ttl=60, qos=1)
            _tell("publish", f"{text!r}, kept for 60 s: nobody listens yet")
        async with alice.subscribe(key, channel, last=2) as messages:
            _tell("subscribe", "alice listens from now on, and wants the last 2 that were kept")
            for _ in range(2):
                _tell("message", f"{_shown(await messages.receive())}, replayed")
            await alice.publish(key, channel, {"cups": 1}, qos=1)
            _tell("publish", "an object, as JSON; the broker has accepted it (qos=1)")
            _tell("message", f"{_shown(await messages.receive())}, live")
            async with alice.watch_presence(key, channel) as presence:
                _tell("presence", _happened(await presence.receive()))
                async with _named(url, "bob") as bob, bob.subscribe(key, channel, last=0):
                    _tell("presence", _happened(await presence.receive()))
                    await bob.publish(key, channel, "one for me, please", echo=False)
                    _tell("message", f"{_shown(await messages.receive())}, from bob")
                _tell("presence", _happened(await presence.receive()))
        seconds = await alice.flush()
        _tell("flush", f"the broker has taken everything; there and back in {seconds * 1e3:.1f} ms")
    _tell("disconnect", "alice has left; the README shows how to write all this")


def _named(url: str, who: str) -> Emitter:
    # Presence shows the user name; one in the URL goes first.
    options = {} if urlsplit(url).username else {"username": who}
    # One that fails is to be told of, and not to be waited for.
    return connect(url, reconnect=None, **options)


def _shown(message: EmitterMessage) -> str:
    return f"{message.as_string()!r} on {message.channel}"


def _happened(event: PresenceEvent) -> str:
    who = ", ".join(map(name, event.who))
    return f"{who} {VERBS[event.event]}"
