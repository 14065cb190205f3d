"""
Draws ``terminals.svg``: two people in ``examples/terminal_chat.py``, one of them cut off.

    python docs/pictures/terminals.py

What is in the picture has been said by the programs: they run here, and their output is drawn.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from emitter_anyio.testing import Broker, FaultProxy

HERE = Path(__file__).parent
CHAT = "examples/terminal_chat.py"
WIDTH, LINE, TOP = 470, 21, 68
COLOURS = {"$": "#8b949e", ">": "#e6edf3", "-": "#7ee787", "!": "#ffa657", " ": "#79c0ff"}


class Terminal:
    """
    A program, and what is to be seen of it.

    The first character of a line says what it is: the command, what was typed, who is there, a line
    of the log, or what somebody else says.
    """

    def __init__(self, process: Process, name: str) -> None:
        assert process.stdin
        assert process.stdout
        self.name = name
        self.lines = [f"$ python {CHAT} {name}"]
        self._stdin = process.stdin
        self._output = BufferedByteReceiveStream(process.stdout)

    async def shows(self, text: str) -> None:
        """Take what comes, until it is this."""
        while True:
            line = (await self._output.receive_until(b"\n", 1000)).decode().rstrip()
            kind = "-" if line.startswith("--") else "!" if line.startswith("the link") else " "
            # The port is another one each time.
            self.lines.append(kind + re.sub(" to mqtt://[^ ]+", "", line))
            if line.startswith(text):
                return

    async def type(self, text: str) -> None:
        self.lines.append(f">{text}")
        await self._stdin.send(f"{text}\n".encode())


@asynccontextmanager
async def terminal(name: str, url: str, secret: str) -> AsyncIterator[Terminal]:
    environment = {**os.environ, "EMITTER_URL": url, "EMITTER_SECRET": secret}
    command = [sys.executable, CHAT, name]
    async with await anyio.open_process(command, env=environment, stderr=-2) as process:
        yield Terminal(process, name)
        process.kill()


def draw(terminals: list[Terminal]) -> str:
    height = TOP + LINE * max(len(each.lines) for each in terminals) + 12
    width = (WIDTH + 16) * len(terminals) - 16
    drawn = []
    for number, each in enumerate(terminals):
        drawn.append(
            f'<g transform="translate({number * (WIDTH + 16)} 0)">'
            f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#161b22" stroke="#30363d"/>'
            '<circle cx="20" cy="20" r="6" fill="#ff5f57"/><circle cx="40" cy="20" r="6" '
            'fill="#febc2e"/><circle cx="60" cy="20" r="6" fill="#28c840"/>'
            f'<text x="{WIDTH / 2}" y="25" text-anchor="middle" fill="#8b949e">{each.name}</text>'
        )
        for row, line in enumerate(each.lines):
            kind = line[0]
            text = line if kind == "$" else line[1:]
            y = TOP + row * LINE
            drawn.append(f'<text x="18" y="{y}" fill="{COLOURS[kind]}">{escape(text)}</text>')
        drawn.append("</g>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        "font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', "
        'monospace" font-size="14" aria-label="Two terminals: Ann and Ben chat, Ben loses his '
        'link, and gets what was said meanwhile">' + "\n".join(drawn) + "</svg>\n"
    )


async def main() -> None:
    async with (
        Broker() as broker,
        FaultProxy(broker.host, broker.port) as network,
        terminal("ann", broker.url, broker.secret_key) as ann,
    ):
        await ann.shows("-- here: ann")
        await ann.type("is anybody there?")
        async with terminal("ben", network.url, broker.secret_key) as ben:
            await ben.shows("ann: is anybody there?")
            await ann.shows("-- here: ann, ben")
            await ben.type("yes, on the train")
            await ann.shows("ben: yes, on the train")
            await anyio.sleep(0.2)  # Ben has not seen yet that it was accepted
            with broker.refuse():
                await network.cut(reset=False)
                await ben.shows("the link")
                await ann.shows("-- here: ann")
                await ann.type("careful, a tunnel ahead")
                await ann.type("still there?")
                await anyio.sleep(0.5)
            await ben.shows("ann: still there?")
            await ann.shows("-- here: ann, ben")
            await ben.type("back, and I missed nothing")
            await ann.shows("ben: back")
            (HERE / "terminals.svg").write_text(draw([ann, ben]))


anyio.run(main)
