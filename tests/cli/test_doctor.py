"""``doctor``: each thing that can be wrong, made wrong."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from emitter_anyio import Emitter, RequestTimeoutError
from emitter_anyio._cli import _doctor, _reaching, _rights
from emitter_anyio._cli._rights import Examination
from emitter_anyio.testing import Broker
from emitter_anyio.testing._outbox import Outbox
from tests.cli.conftest import Cli, Done
from tests.cli.test_presence import there
from tests.support import tls
from tests.support.background import Background, background


def verdicts(done: Done) -> dict[str, str]:
    told = [json.loads(line) for line in done.lines]
    assert len({each["check"] for each in told}) == len(told)
    return {each["check"]: each["verdict"] for each in told}


def found(done: Done, check: str) -> dict[str, str]:
    (one,) = [each for each in map(json.loads, done.lines) if each["check"] == check]
    return dict(one)


REACHED = {
    "broker": "ok",
    "dns": "ok",
    "tcp": "ok",
    "connack": "ok",
    "latency": "ok",
    "flush": "ok",
    "secret": "ok",
}


class TestWell:
    def test_every_right_but_extend(
        self,
        cli: Cli,
        place: Background,
        unique: str,
        backend: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # A machine that is busy enough pauses as a broker does that holds back its answers.
        monkeypatch.setattr(_doctor, "_HELD_BACK", math.inf)
        done = cli(
            *("doctor", "--channel", unique, "--key", place.key(unique, "rwslp"), "--json"),
            *("--backend", backend),
        )
        assert (done.code, done.errors) == (0, "")
        assert verdicts(done) == {
            **REACHED,
            **dict.fromkeys(["key p", "key l", "key r", "key w", "key s", "clock"], "ok"),
            "key e": "note",
        }
        assert "came back in" in found(done, "key w")["text"]

    def test_for_people(self, cli: Cli, place: Background, unique: str) -> None:
        key = place.key(unique, "rw")
        done = cli("doctor", "--channel", unique, "--key", key, secret=False)
        assert (done.code, done.errors) == (0, "")
        assert done.lines[0] == f"ok       broker     {place.url}, from EMITTER_URL"
        assert done.lines[-1] == "all is well"
        assert key not in done.output

    def test_on_a_terminal(self, on_terminal: Any, backend: str) -> None:
        code, screen = on_terminal("doctor", "--backend", backend)
        assert code == 0
        assert screen.text.endswith("all is well\n")
        assert b"\x1b[32mok" in screen.raw

    def test_an_extend_key(self, cli: Cli, place: Background, unique: str) -> None:
        done = cli("doctor", "--channel", unique, "--key", place.key(unique, "e"), "--json")
        assert done.code == 0
        assert verdicts(done)["key e"] == "ok"

    def test_websocket(self, cli: Cli, place: Background, backend: str) -> None:
        url = place.url.replace("mqtt", "ws") + "/any"
        done = cli("doctor", "--url", url, "--json", "--backend", backend)
        assert done.code == 0
        assert verdicts(done)["websocket"] == "ok"

    def test_a_unix_socket(self, cli: Cli, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with answering(socket.AF_UNIX, path, b"\x20\x02\x00\x00"):
            done = cli("doctor", "--url", f"unix://{path}", "--json")
        assert done.code == 1
        assert verdicts(done) == {"broker": "ok", "socket": "ok", "connack": "ok", "link": "wrong"}

    def test_a_key_for_no_channel(
        self, cli: Cli, place: Background, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EMITTER_KEY", place.key("a/", "r"))
        done = cli("doctor", "--json")
        assert done.code == 0
        assert found(done, "key")["verdict"] == "untried"


class TestCare:
    """It publishes only where it may."""

    def test_somebody_listens(self, cli: Cli, place: Background, unique: str) -> None:
        arguments = ("doctor", "--channel", unique, "--key", place.key(unique, "rwp"), "--json")
        with there(place, unique, "ann"):
            done = cli(*arguments)
            assert done.code == 0
            assert found(done, "key w") == {
                "check": "key w",
                "verdict": "untried",
                "text": "writing was not tried: 1 would get the message",
                "way": "--probe publishes all the same",
            }
            assert found(cli(*arguments, "--need", "w"), "key w")["verdict"] == "wrong"
            assert found(cli(*arguments, "--probe"), "key w")["verdict"] == "ok"

    def test_not_wanted(self, cli: Cli, place: Background, unique: str) -> None:
        key = place.key(unique, "rws")
        done = cli("doctor", "--channel", unique, "--key", key, "--no-probe", "--json")
        assert done.code == 0
        assert verdicts(done)["key w"] == verdicts(done)["key s"] == "untried"

    def test_not_needed(self, cli: Cli, place: Background, unique: str) -> None:
        key = place.key(unique, "rw")
        done = cli("doctor", "--channel", unique, "--key", key, "--need", "r", "--json")
        assert done.code == 0
        assert not {"key w", "key s"} & {*verdicts(done)}


class TestRights:
    @pytest.mark.parametrize(
        ("permissions", "need"), [("w", "r"), ("r", "w"), ("wr", "s"), ("rwl", "s"), ("rw", "e")]
    )
    def test_lacking(
        self, cli: Cli, place: Background, unique: str, permissions: str, need: str
    ) -> None:
        key = place.key(unique, permissions)
        done = cli("doctor", "--channel", unique, "--key", key, "--need", need, "--json")
        assert done.code == 1
        assert found(done, f"key {need}")["verdict"] == "wrong"
        assert done.error == f"something is wrong: key {need}"

    def test_not_stored_and_not_needed(self, cli: Cli, place: Background, unique: str) -> None:
        key = place.key(unique, "rwl")
        done = cli("doctor", "--channel", unique, "--key", key, "--json")
        assert (done.code, verdicts(done)["key s"]) == (0, "note")

    def test_writing_alone(self, cli: Cli, place: Background, unique: str) -> None:
        key = place.key(unique, "w")
        done = cli("doctor", "--channel", unique, "--key", key, "--json")
        assert (done.code, found(done, "key w")["verdict"]) == (0, "ok")

    @pytest.mark.parametrize("key", ["a" * 32, "a/b"])
    def test_nothing(self, cli: Cli, unique: str, key: str) -> None:
        done = cli("doctor", "--channel", unique, "--key", key, "--json")
        assert (done.code, done.error) == (1, "something is wrong: key")
        assert "keygen makes another" in found(done, "key")["way"]
        assert key not in done.output

    def test_no_answer(
        self, cli: Cli, place: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def silent(*args: object, **options: object) -> None:
            raise RequestTimeoutError("presence: no answer")

        monkeypatch.setattr(Emitter, "presence", silent)
        done = cli("doctor", "--channel", unique, "--key", place.key(unique, "r"), "--json")
        assert (done.code, found(done, "key p")["verdict"]) == (1, "wrong")

    def test_others_publish_meanwhile(
        self, cli: Cli, place: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish = Emitter.publish

        async def among_others(emitter: Emitter, *arguments: Any, **options: Any) -> None:
            await place_publish()
            await publish(emitter, *arguments, **options)
            await place_publish()

        async def place_publish() -> None:
            await anyio.to_thread.run_sync(lambda: place.publish(unique, "another", ttl=60))

        monkeypatch.setattr(Emitter, "publish", among_others)
        done = cli("doctor", "--channel", unique, "--key", place.key(unique, "rwsl"), "--json")
        assert (done.code, verdicts(done)["key w"], verdicts(done)["key s"]) == (0, "ok", "ok")

    def test_nothing_is_delivered(
        self,
        cli: Cli,
        place: Background,
        unique: str,
        backend: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def impatient(*arguments: Any, **options: Any) -> Examination:
            return Examination(*arguments, **{**options, "patience": 0.01})

        # Only the delivery is given little time: a busy machine may need more for the other steps.
        monkeypatch.setattr(_doctor, "Examination", impatient)
        with place.broker.lose("message"):
            done = cli(
                *("doctor", "--channel", unique, "--key", place.key(unique, "rw"), "--json"),
                *("--backend", backend),
            )
        assert (done.code, done.error) == (1, "something is wrong: delivery")

    def test_the_secret(self, cli: Cli) -> None:
        done = cli("doctor", "--secret", "a/b", "--json")
        assert (done.code, done.error) == (1, "something is wrong: secret")


class TestClock:
    @pytest.mark.parametrize("permissions", ["p", "rwsl"])
    def test_ahead(self, cli: Cli, unique: str, permissions: str) -> None:
        with background() as ahead:
            ahead.broker.advance(100)
            key = ahead.key(unique, permissions)
            done = cli(
                "doctor", "-u", ahead.url, "--channel", unique, "-k", key, "--json", secret=False
            )
        assert (done.code, done.error) == (1, "something is wrong: clock")
        assert " s ahead of ours" in found(done, "clock")["text"]

    def test_behind(
        self, cli: Cli, place: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours = SimpleNamespace(time=lambda: time.time() + 100, perf_counter=time.perf_counter)
        monkeypatch.setattr(_rights, "time", ours)
        key = place.key(unique, "p")
        done = cli("doctor", "--channel", unique, "-k", key, "--json")
        assert " s behind ours" in found(done, "clock")["text"]


class TestBroker:
    def test_it_holds_back_what_follows_a_burst(
        self, cli: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # However slow we are, it allows no more writes meanwhile.
        allowed = repeat(True, 60)
        monkeypatch.setattr(Outbox, "_may_write", lambda self: next(allowed, False))
        with background(coalesce=True) as slow:
            done = cli("doctor", "--url", slow.url, "--json", secret=False)
        assert (done.code, found(done, "flush")["verdict"]) == (0, "note")
        assert "limit.flushRate" in found(done, "flush")["way"]

    def test_no_answers(self, cli: Cli, place: Background) -> None:
        with place.broker.lose("answer"):
            done = cli("doctor", "--json", secret=False)
        assert (done.code, done.error) == (1, "something is wrong: flush")
        assert "0 of 100" in found(done, "flush")["text"]

    def test_no_pong(self, cli: Cli, place: Background) -> None:
        with place.broker.lose("pingresp"):
            # For each step: the ones before it must be done in this time on a busy machine.
            done = cli("doctor", "--json", "--timeout", "2")
        assert (done.code, done.error) == (1, "something is wrong: latency")

    @pytest.mark.parametrize("step", ["flush", "keygen"])
    def test_the_link_is_lost(
        self, cli: Cli, place: Background, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        async def cut(emitter: Emitter, *arguments: Any, **options: Any) -> None:
            me = (await emitter.me()).id
            place.start_soon(lambda: place.broker.drop(me))
            await anyio.sleep_forever()

        monkeypatch.setattr(Emitter, step, cut)
        done = cli("doctor", "--json")
        assert (done.code, done.error) == (1, "something is wrong: link")


@contextmanager
def answering(family: int, address: Any, answer: bytes) -> Iterator[Any]:
    """Listen, and answer to the first client with these bytes and a goodbye."""
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen()

    def answer_once() -> None:
        link, _ = listener.accept()
        with link:
            link.recv(1024)
            link.sendall(answer)
            link.shutdown(socket.SHUT_WR)
            while link.recv(1024):
                pass

    thread = threading.Thread(target=answer_once)
    thread.start()
    with listener:
        yield listener.getsockname()
        thread.join()


LOOPBACK = (socket.AF_INET, ("127.0.0.1", 0))


class TestReaching:
    def test_no_such_name(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(*args: object, **options: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(anyio, "getaddrinfo", fail)
        done = cli("doctor", "--url", "mqtt://broker.invalid", "--json")
        assert (done.code, done.error) == (1, "something is wrong: dns")
        assert found(done, "dns")["text"] == "broker.invalid: Name or service not known"

    def test_a_name(self, cli: Cli, place: Background) -> None:
        url = place.url.replace("127.0.0.1", "localhost")
        assert "localhost is " in found(cli("doctor", "--url", url, "--json"), "dns")["text"]

    def test_nobody_listens(self, cli: Cli, backend: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        url = f"mqtt://127.0.0.1:{port}"
        done = cli("doctor", "--url", url, "--json", "--backend", backend)
        assert (done.code, done.error) == (1, "something is wrong: tcp")
        assert found(done, "tcp")["text"].endswith("Connection refused")

    def test_packets_are_swallowed(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        async def wait(*args: object, **options: object) -> None:
            await anyio.sleep_forever()

        monkeypatch.setattr(anyio, "connect_tcp", wait)
        # The step before it must be done in this time on a busy machine.
        done = cli("doctor", "--timeout", "2", "--json")
        assert found(done, "tcp")["text"].endswith("no answer within 2 s")

    def test_no_such_socket(self, cli: Cli) -> None:
        done = cli("doctor", "--url", "unix:///no/such/socket", "--json")
        assert (done.code, done.error) == (1, "something is wrong: socket")

    @pytest.mark.parametrize(
        ("answer", "way"),
        [
            (b"\x20\x02\x00\x05", "user and password go into the URL"),
            (b"\x20\x02\x00\x01", ""),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "something else than a broker"),
            (b"", "does a broker listen there"),
        ],
    )
    def test_no_connack(self, cli: Cli, answer: bytes, way: str) -> None:
        with answering(*LOOPBACK, answer) as (host, port):
            done = cli("doctor", "--url", f"mqtt://{host}:{port}", "--json")
        assert (done.code, done.error) == (1, "something is wrong: connack")
        assert found(done, "connack").get("way", "").startswith(way)

    def test_no_answer(self, cli: Cli, place: Background) -> None:
        with place.broker.lose("connack"):
            done = cli("doctor", "--timeout", "2", "--json")
        assert found(done, "connack")["text"].endswith("no answer within 2 s")

    def test_no_websocket(self, cli: Cli) -> None:
        with answering(*LOOPBACK, b"HTTP/1.1 404 Not Found\r\n\r\n") as (host, port):
            done = cli("doctor", "--url", f"ws://{host}:{port}", "--json")
        assert (done.code, done.error) == (1, "something is wrong: websocket")

    def test_a_websocket_and_no_broker(self, cli: Cli, place: Background) -> None:
        with place.broker.refuse(4):
            done = cli("doctor", "--url", place.url.replace("mqtt", "ws"), "--json")
        assert verdicts(done)["websocket"] == "ok"
        assert done.error == "something is wrong: connack"


class TestTls:
    def test_well(self, cli: Cli, secure: Background, cafile: str, backend: str) -> None:
        done = cli(
            *("doctor", "--url", secure.url, "--cafile", cafile, "--json", "--backend", backend),
            secret=False,
        )
        assert done.code == 0
        assert found(done, "tls")["text"].startswith("TLSv1.3, and a certificate for 127.0.0.1")

    def test_soon_to_end(
        self, cli: Cli, secure: Background, cafile: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_reaching, "_SOON", float("inf"))
        done = cli("doctor", "--url", secure.url, "--cafile", cafile, "--json", secret=False)
        assert (done.code, found(done, "tls")["verdict"]) == (0, "note")

    def test_an_authority_of_ones_own(self, cli: Cli, secure: Background) -> None:
        done = cli("doctor", "--url", secure.url, "--json")
        assert (done.code, done.error) == (1, "something is wrong: tls")
        assert "--cafile FILE trusts it" in found(done, "tls")["way"]

    def test_another_name(self, cli: Cli, cafile: str) -> None:
        with background_of("elsewhere.example") as url:
            done = cli("doctor", "--url", url, "--cafile", cafile, "--json")
        assert "connect to a name that is in the certificate" in found(done, "tls")["way"]

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "wrong version number"),
            (b"", "the peer closed the link in the handshake"),
        ],
    )
    def test_no_tls(self, cli: Cli, answer: bytes, text: str) -> None:
        with answering(*LOOPBACK, answer) as (host, port):
            done = cli("doctor", "--url", f"mqtts://{host}:{port}", "--json")
        assert found(done, "tls")["text"] in (text, "record layer failure")

    def test_no_answer(self, cli: Cli) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"mqtts://127.0.0.1:{listener.getsockname()[1]}"
            done = cli("doctor", "--url", url, "--timeout", "2", "--json")
        assert found(done, "tls")["text"] == "no answer within 2 s"


@contextmanager
def background_of(name: str) -> Iterator[str]:
    """Run a broker whose certificate is for another name."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal("trio") as portal:
        broker = Broker(ssl_context=tls.server_context(name))
        with portal.wrap_async_context_manager(broker):
            yield broker.url


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--key", "x"], "--key needs --channel"),
            (["--need", "r"], "--need needs --channel"),
            (["--need", "rz", "--channel", "a/"], "expected letters out of r"),
        ],
    )
    def test_wrong(self, cli: Cli, arguments: list[str], says: str) -> None:
        done = cli("doctor", *arguments)
        assert done.code == 2
        assert says in done.error
