"""The command ``demo``."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import secrets
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import anyio
from anyio import TCPConnectable

from emitter_anyio import (
    Backoff,
    ConnectError,
    Emitter,
    EmitterMessage,
    EventStream,
    Gap,
    PresenceEvent,
    connect,
)
from emitter_anyio._net.options import make_options

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, CommandError, Parser, UsageError
from ._output import print_line
from ._presence import VERBS, name
from ._terminal import make_styler

if TYPE_CHECKING:
    from emitter_anyio.testing import FaultProxy

_STYLES: Final = {
    "publish": "yellow",
    "message": "green",
    "presence": "cyan",
    "cut": "bold red",
    "reconnect": "bold green",
    "resume": "bold green",
    "next": "bold",
}
"""The styles of steps on a terminal; the others are dim."""


def add_demo(parser: Parser) -> None:
    """Add the arguments of ``demo``."""
    parser.set_command(
        _demo,
        description=(
            "Show a subscription that survives a lost connection.\n\n"
            "Two clients, ann and ben, publish, receive stored messages and watch presence.\n"
            "Then ann's connection is cut. Each step prints one line. Without --url, the\n"
            "demo starts a development broker.\n\n"
            f"{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --backend trio\n"
            "  EMITTER_SECRET=... %(prog)s --url 127.0.0.1:8080"
        ),
    )
    parser.add_argument(
        "-u",
        "--url",
        type=arguments_.url,
        help="broker to use, such as wss://HOST or HOST:PORT",
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
    if url is not None and url.startswith("unix:"):
        raise UsageError("the demo cuts a connection over TCP, so it cannot use a unix:// URL")
    # A failure is raised and reported in one line; the log would report it again.
    logging.getLogger("emitter_anyio").addHandler(logging.NullHandler())
    demo = _Demo()
    program: str = arguments.parser.prog
    program = program.removesuffix(" demo")
    demo.step("backend", _describe_backend(arguments.backend))
    with anyio.move_on_after(arguments.timeout):
        async with AsyncExitStack() as stack:
            if url is None:
                from emitter_anyio.testing import Broker

                broker = await stack.enter_async_context(Broker())
                url, secret = broker.url, broker.secret_key
                demo.step("broker", f"started a development broker on {url}")
            try:
                await demo.run(url, secret)
            except ConnectError as exc:
                raise CommandError(f"{exc}; without --url, the demo starts a broker") from exc
        if arguments.url is None:
            demo.step("next", f"{program} broker    # for your own programs, and all commands")
        else:
            demo.step("next", f"{program} doctor --url {make_options(url, {}).servers[0]}")
        return
    raise CommandError(
        f"the demo did not finish within {arguments.timeout:g} s: the broker is slow, or does not "
        "store or deliver messages; use a longer --timeout"
    )


def _describe_backend(backend: str) -> str:
    other = "asyncio" if backend == "trio" else "trio"
    return (
        f"{'Trio' if backend == 'trio' else backend}, on Python {platform.python_version()}; "
        f"--backend {other} does the same"
    )


class _Demo:
    """The steps of the demonstration, each of which prints a line."""

    def __init__(self) -> None:
        self._style = make_styler(sys.stdout)

    def step(self, step: str, text: str) -> None:
        """Print a line."""
        print_line(text, styled=self._style(f"{step:<12}", _STYLES.get(step, "dim")))

    async def run(self, url: str, secret: str) -> None:
        """Run the steps against a broker."""
        from emitter_anyio.testing import FaultProxy

        server = make_options(url, {}).servers[0]
        # A random name, because other clients of the broker might use the channel demo/.
        channel = f"demo/{secrets.token_hex(3)}/"
        async with _client(url, "ben", reconnect=None) as ben:
            self.step("connect", "ben connected to the broker")
            key = (await ben.keygen(secret, channel, "rwslp")).key
            self.step("keygen", f"a key for {channel} to read, write, store, load and see presence")
            for text in ("the kettle is on", "tea is ready"):
                await self._publish(ben, key, channel, text)
            async with (
                FaultProxy(server.host, server.port) as network,
                _client(
                    url,
                    "ann",
                    connectable=TCPConnectable(network.host, network.port),
                    # If the broker has stopped, report that soon.
                    reconnect=Backoff(tries=3),
                ) as ann,
                ann.subscribe(key, channel, last=2, resume=True, mark_gaps=True) as messages,
            ):
                self.step("subscribe", "ann subscribed, requesting the last 2 stored messages")
                for _ in range(2):
                    self._show(await messages.receive(), "replayed")
                await ben.publish(key, channel, {"cups": 1}, qos=1)
                self.step("publish", "ben: an object as JSON; the broker accepted it (qos=1)")
                self._show(await messages.receive(), "live")
                async with ben.watch_presence(key, channel) as presence:
                    self._show_presence(await presence.receive())
                    await self._cut(ann, network)
                    self._show_presence(await presence.receive())
                    for text in ("the cake is ready", "there is jam"):
                        await self._publish(ben, key, channel, text)
                    await self._reconnect(ann, network, messages)
                    self._show_presence(await presence.receive())
                seconds = await ben.flush()
                took = f"round trip {seconds * 1e3:.1f} ms"
                self.step("flush", f"the broker has read everything that ben sent ({took})")
        self.step("disconnect", "ann and ben disconnected; the README has the code of such steps")

    async def _publish(self, client: Emitter, key: str, channel: str, text: str) -> None:
        await client.publish(key, channel, text, ttl=60, qos=1)
        self.step("publish", f"ben: {text!r}, stored for 60 s")

    async def _cut(self, client: Emitter, network: FaultProxy) -> None:
        async with client.stream("disconnect") as losses:
            network.stall()  # new connections, too
            await network.cut()
            await losses.receive()
        self.step("cut", "the connection between ann and the broker is lost")

    async def _reconnect(
        self, client: Emitter, network: FaultProxy, messages: EventStream[EmitterMessage | Gap]
    ) -> None:
        network.resume()
        await client.wait_connected()
        self.step("reconnect", "ann reconnected, and the client restored the subscription")
        for _ in range(3):
            self._show(await messages.receive(), "resumed")

    def _show(self, item: EmitterMessage | Gap, how: str) -> None:
        if isinstance(item, EmitterMessage):
            self.step("message", f"ann: {item.as_string()!r} on {item.channel}, {how}")
        elif item.complete:
            self.step("resume", f"ann has missed nothing: {item.resumed} stored messages follow")
        else:
            raise CommandError(f"the demo lost messages: {item.reason}")

    def _show_presence(self, event: PresenceEvent) -> None:
        self.step("presence", f"{', '.join(map(name, event.who))} {VERBS[event.event]}")


def _client(url: str, username: str, **options: Any) -> Emitter:
    # A user name in the URL takes precedence; a second one would be an error.
    if not urlsplit(url).username:
        options["username"] = username
    return connect(url, **options)
