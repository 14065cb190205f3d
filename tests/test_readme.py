"""
The README, held to what it says: its names and files exist, and every block of it is run.

A block that calls ``anyio.run`` is a whole program, and one that defines a test is a file for
pytest: both run in a process of their own. All others are pieces of a program, and get the names
that the README says they have, and no more: ``emitter``, ``KEY``, ``URL``, ``HOST``, ``PORT``,
``anyio`` and the public names of the package. Beside that, ``print`` is ours, so that a test can
wait for what a piece says.
"""

from __future__ import annotations

import ast
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import trio
from anyio.streams.memory import MemoryObjectReceiveStream

from emitter_anyio import Emitter, connect
from emitter_anyio.testing import Broker
from tests.support.command import ROOT, run, running

README = (ROOT / "README.md").read_text()
LINES = README.splitlines()
NAMES = ["emitter", "KEY", "URL", "HOST", "PORT", "anyio", "emitter_anyio"]


def blocks(language: str) -> dict[tuple[str, int], str]:
    """Find the blocks of a language, by the heading above and their number below it."""
    found: dict[tuple[str, int], str] = {}
    heading, number = "", 0
    block: list[str] | None = None
    for line in LINES:
        if block is not None:
            if line == "```":
                found[heading, number] = "\n".join(block) + "\n"
                number, block = number + 1, None
            else:
                block.append(line)
        elif line.startswith("#"):
            heading, number = line.lstrip("# "), 0
        elif line == f"```{language}":
            block = []
    return found


PYTHON = blocks("python")
SHELL = [line for block in blocks("sh").values() for line in block.splitlines()]
RUN: set[tuple[str, int]] = set()


def runs(heading: str, number: int = 0) -> Callable[..., Any]:
    """Give a test the block that it runs."""
    RUN.add((heading, number))
    return pytest.mark.parametrize("source", [PYTHON[heading, number]], ids=[f"{heading} {number}"])


class TestContents:
    @pytest.mark.parametrize(
        "command",
        [
            "python -m pip install . && python -m emitter_anyio demo",
            "python -m pip install nox && python -m nox",
        ],
    )
    def test_each_of_the_two_commands_is_one_line(self, command: str) -> None:
        assert command in SHELL

    def test_it_says_which_names_the_pieces_have(self) -> None:
        (paragraph,) = re.findall(r"^In the pieces below.+?\n\n", README, re.MULTILINE | re.DOTALL)
        assert sorted(set(re.findall(r"`(\w+)`", paragraph)) - {"rwslp"}) == sorted(NAMES)
        assert README.index(paragraph) < README.index("## Streams or handlers")

    def test_every_file_it_names_is_there(self) -> None:
        links = re.findall(r"\]\((?!https:)([^)#]+)", README)
        assert links
        for name in links:
            assert (ROOT / name).exists()

    def test_every_verb_it_names_is_there(self) -> None:
        (paragraph,) = re.findall(
            r"^\*\*There is more\*\*.+?\n\n", README, re.MULTILINE | re.DOTALL
        )
        for verb in re.findall(r"`(\w+)", paragraph):
            assert callable(getattr(Emitter, verb))

    def test_every_block_is_run(self) -> None:
        assert set(PYTHON) == RUN


class TestShell:
    @pytest.mark.parametrize("line", SHELL)
    def test_each_line(self, line: str) -> None:
        for command in line.split(" && "):
            match re.sub(r"\b[A-Z_]+=\S+ ", "", command).split()[2:]:
                case ["pip", "install", package]:
                    assert package == "nox" or (ROOT / package / "pyproject.toml").is_file()
                case ["nox"]:
                    assert (ROOT / "noxfile.py").is_file()
                case ["nox", "-s", session]:
                    assert (
                        f"\ndef {session}(session: nox.Session)"
                        in (ROOT / "noxfile.py").read_text()
                    )
                case ["emitter_anyio", "demo"]:
                    done = run("-m", "emitter_anyio", "demo")
                    assert (done.returncode, done.stderr) == (0, "")
                case ["emitter_anyio", "broker"]:
                    # The documented port may be taken on this machine.
                    with running("-m", "emitter_anyio", "broker", "--port", "0") as process:
                        assert process.stdout is not None
                        said = [process.stdout.readline().split()[0] for _ in range(3)]
                    assert said == ["listening", "license", "secret"]
                case _:
                    pytest.fail(f"this line is not tested: {line}")


class TestPrograms:
    @pytest.mark.parametrize("call", range(3))
    @runs("emitter_anyio")
    def test_the_first_one(self, source: str, call: int, tmp_path: Path) -> None:
        # The first form is the program's own; its comment names the others.
        own, *others = re.findall(r"\w+\.run\(main.*?\)", source)
        form = [own, *others][call]
        program = tmp_path / "program.py"
        program.write_text(
            source.replace(own, form, 1).replace("import anyio\n", "import anyio, trio\n")
        )
        done = run(str(program))
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "chat/ hello\n")

    @runs("Testing your program")
    def test_the_test(self, source: str, tmp_path: Path) -> None:
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / "test_chat.py").write_text(source)
        (tmp_path / "test_wrong.py").write_text(source.replace('== "hello"', '== "goodbye"'))
        done = run("-m", "pytest", "--color=no", "-rA", str(tmp_path))
        assert len(re.findall(r"^PASSED .*test_chat\.py::", done.stdout, re.MULTILINE)) == 2
        assert len(re.findall(r"^FAILED .*test_wrong\.py::", done.stdout, re.MULTILINE)) == 2


class Place(SimpleNamespace):
    """Where a piece runs: the broker, our own client, and the names that the piece has."""

    broker: Broker
    emitter: Emitter
    key: str
    names: dict[str, Any]


@pytest.fixture
async def place(anyio_backend: object) -> AsyncIterator[Place]:
    async with Broker() as broker, connect(broker.url) as emitter:
        key = broker.keygen("chat/", "rwslp")
        names: dict[str, Any] = {}
        exec("import anyio\nfrom emitter_anyio import *", names)
        names |= {"emitter": emitter, "KEY": key}
        names |= {"URL": broker.url, "HOST": broker.host, "PORT": broker.port}
        yield Place(broker=broker, emitter=emitter, key=key, names=names)


@asynccontextmanager
async def piece(
    source: str, names: dict[str, Any]
) -> AsyncIterator[MemoryObjectReceiveStream[str]]:
    """Run a piece beside the block, which gets what it prints; leaving the block ends the piece."""
    send, printed = anyio.create_memory_object_stream[str](100)

    async def go() -> None:
        with send:
            await eval(code, names)

    names["print"] = lambda *values: send.send_nowait(" ".join(map(str, values)))
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(go)
        with printed:
            yield printed
        tasks.cancel_scope.cancel()


async def run_piece(source: str, names: dict[str, Any]) -> list[str]:
    """Run a piece that ends by itself, and give what it prints."""
    async with piece(source, names) as printed:
        return [line async for line in printed]


class TestPieces:
    @runs("Streams or handlers", 0)
    async def test_a_stream(self, source: str, place: Place) -> None:
        await place.emitter.publish(place.key, "chat/", {"text": "stored"}, ttl=60, qos=1)
        async with piece(source, place.names) as printed:
            assert await printed.receive() == "chat/ {'text': 'stored'}"
            await place.emitter.publish(place.key, "chat/", ["live"])
            assert await printed.receive() == "chat/ ['live']"

    @runs("Streams or handlers", 1)
    async def test_handlers(self, source: str, place: Place) -> None:
        assert await run_piece(source, place.names) == ["chat/ hello"]
        assert place.names["emitter"] is not place.emitter
        assert place.names["emitter"].state == "closed"

    @runs("In a task group, or a Trio nursery")
    async def test_a_task_group(self, source: str, place: Place) -> None:
        async with place.emitter.subscribe(place.key, "chat/", last=0) as messages:
            assert await run_piece(source, place.names) == []
            assert (await messages.receive()).as_string() == "hello"
        assert place.names["emitter"].state == "closed"

    @pytest.mark.parametrize("anyio_backend", ["trio"])
    @runs("In a task group, or a Trio nursery")
    async def test_a_nursery(self, source: str, place: Place) -> None:
        group, nursery = re.findall(r"\w+\.\w+\(\)", source.splitlines()[0])
        assert nursery == "trio.open_nursery()"
        place.names["trio"] = trio
        await self.test_a_task_group(source.replace(group, nursery), place)

    @runs("When the link is lost")
    async def test_what_was_missed_comes_before_what_is_live(
        self, source: str, place: Place
    ) -> None:
        async with place.emitter.watch_presence(place.key, "chat/") as changes:
            async with piece(source, {**place.names, "emitter": place.emitter}) as printed:
                while (await changes.receive()).event != "subscribe":
                    pass
                await place.broker.publish("chat/", "before")
                assert await printed.receive() == "live: before"
                await place.broker.drop()
                await place.broker.publish("chat/", "meanwhile", ttl=60)
                assert await printed.receive() == "missed: meanwhile"
                await place.emitter.publish(place.key, "chat/", "after")
                assert await printed.receive() == "live: after"
