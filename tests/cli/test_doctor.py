"""``doctor``: each check, with and without the problem that it detects."""

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
from anyio.abc import TaskStatus

from emitter_anyio import Emitter, NotFoundError, RequestTimeoutError
from emitter_anyio._cli import _cluster_checks, _connection_checks, _doctor, _key_checks
from emitter_anyio._cli._key_checks import KeyChecks
from emitter_anyio._features import history
from emitter_anyio.testing import Broker
from emitter_anyio.testing._outbox import Outbox
from tests.cli.conftest import Cli, Done
from tests.cli.test_presence import subscribed
from tests.support import tls
from tests.support.background import Background, background


def statuses(done: Done) -> dict[str, str]:
    """Return the status of each check; the verdict, which comes last, agrees with them."""
    results = [json.loads(line) for line in done.lines]
    assert len({each["check"] for each in results}) == len(results)
    *checks, (last, verdict) = [(each["check"], each["status"]) for each in results]
    assert last == "verdict"
    assert verdict == ("failed" if "failed" in dict(checks).values() else "ok")
    return dict(checks)


def verdict_of(done: Done) -> str:
    """Return the verdict, which stderr does not repeat."""
    assert done.errors == ""
    return result_of(done, "verdict")["text"]


def result_of(done: Done, check: str) -> dict[str, str]:
    (one,) = [each for each in map(json.loads, done.lines) if each["check"] == check]
    return dict(one)


CONNECTED = {
    "broker": "ok",
    "dns": "ok",
    "tcp": "ok",
    "connack": "ok",
    "latency": "ok",
    "flush": "ok",
    "secret": "ok",
    "history": "ok",
    "keyban": "ok",
}


class TestHealthy:
    def test_all_checks_pass(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        backend: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # A busy machine might pause for as long as a throttling broker.
        monkeypatch.setattr(_doctor, "_THROTTLED_PAUSE_SECONDS", math.inf)
        done = cli(
            *("doctor", "--channel", unique, "--key", server.key(unique, "rwslp"), "--json"),
            *("--backend", backend),
        )
        assert (done.code, done.errors) == (0, "")
        assert statuses(done) == {
            **CONNECTED,
            **dict.fromkeys(["key p", "key l", "key r", "key w", "key s", "clock"], "ok"),
            "key e": "note",
        }
        assert "delivered in" in result_of(done, "key w")["text"]

    def test_text_output(self, cli: Cli, server: Background, unique: str) -> None:
        key = server.key(unique, "rw")
        done = cli("doctor", "--channel", unique, "--key", key, secret=False)
        assert (done.code, done.errors) == (0, "")
        assert key not in done.output
        assert done.lines[0] == f"ok       broker     {server.url} (from EMITTER_URL)"
        assert done.lines[-1] == (
            "ok       verdict    no problems found; "
            "notes: key p, key l, key e; not checked: key s, history, clock"
        )

    def test_terminal_output_is_coloured(self, on_terminal: Any, backend: str) -> None:
        code, screen = on_terminal("doctor", "--backend", backend)
        assert code == 0
        assert screen.text.endswith("no problems found; not checked: key, clock\n")
        assert b"\x1b[32mok" in screen.raw

    def test_extend_key_has_permission_e(self, cli: Cli, server: Background, unique: str) -> None:
        done = cli("doctor", "--channel", unique, "--key", server.key(unique, "e"), "--json")
        assert done.code == 0
        assert statuses(done)["key e"] == "ok"

    def test_websocket_handshake_is_checked(
        self, cli: Cli, server: Background, backend: str
    ) -> None:
        url = server.url.replace("mqtt", "ws") + "/any"
        done = cli("doctor", "--url", url, "--json", "--backend", backend)
        assert done.code == 0
        assert statuses(done)["websocket"] == "ok"

    def test_unix_socket_is_checked(self, cli: Cli, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with listener_that_sends(socket.AF_UNIX, path, b"\x20\x02\x00\x00"):
            done = cli("doctor", "--url", f"unix://{path}", "--json")
        assert done.code == 1
        assert statuses(done) == {
            "broker": "ok",
            "socket": "ok",
            "connack": "ok",
            "connection": "failed",
        }

    def test_key_without_channel_is_skipped(
        self, cli: Cli, server: Background, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EMITTER_KEY", server.key("a/", "r"))
        done = cli("doctor", "--json")
        assert done.code == 0
        assert result_of(done, "key")["status"] == "skipped"


class TestProbe:
    def test_channel_with_subscribers_is_not_published_to(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        arguments = ("doctor", "--channel", unique, "--key", server.key(unique, "rwp"), "--json")
        with subscribed(server, unique, "ann"):
            done = cli(*arguments)
            assert done.code == 0
            assert result_of(done, "key w") == {
                "check": "key w",
                "status": "skipped",
                "text": "no message was published: the channel has 1 subscriber",
                "fix": "use --probe to publish one",
            }
            assert result_of(cli(*arguments, "--need", "w"), "key w")["status"] == "failed"
            assert result_of(cli(*arguments, "--probe"), "key w")["status"] == "ok"

    def test_no_probe_skips_the_message(self, cli: Cli, server: Background, unique: str) -> None:
        key = server.key(unique, "rws")
        done = cli("doctor", "--channel", unique, "--key", key, "--no-probe", "--json")
        assert done.code == 0
        assert statuses(done)["key w"] == statuses(done)["key s"] == "skipped"

    def test_message_is_not_published_unless_needed(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        key = server.key(unique, "rw")
        done = cli("doctor", "--channel", unique, "--key", key, "--need", "r", "--json")
        assert done.code == 0
        assert not {"key w", "key s"} & {*statuses(done)}


class TestPermissions:
    @pytest.mark.parametrize(
        ("permissions", "need"), [("w", "r"), ("r", "w"), ("wr", "s"), ("rwl", "s"), ("rw", "e")]
    )
    def test_missing_needed_permission_fails(
        self, cli: Cli, server: Background, unique: str, permissions: str, need: str
    ) -> None:
        key = server.key(unique, permissions)
        done = cli("doctor", "--channel", unique, "--key", key, "--need", need, "--json")
        assert done.code == 1
        assert result_of(done, f"key {need}")["status"] == "failed"
        assert verdict_of(done) == f"failed checks: key {need}"

    def test_missing_permission_is_a_note(self, cli: Cli, server: Background, unique: str) -> None:
        key = server.key(unique, "rwl")
        done = cli("doctor", "--channel", unique, "--key", key, "--json")
        assert (done.code, statuses(done)["key s"]) == (0, "note")

    def test_write_only_key_passes(self, cli: Cli, server: Background, unique: str) -> None:
        key = server.key(unique, "w")
        done = cli("doctor", "--channel", unique, "--key", key, "--json")
        assert (done.code, result_of(done, "key w")["status"]) == (0, "ok")

    @pytest.mark.parametrize("key", ["a" * 32, "a/b"])
    def test_key_without_permissions_fails(self, cli: Cli, unique: str, key: str) -> None:
        done = cli("doctor", "--channel", unique, "--key", key, "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: key")
        assert "keygen to generate a new one" in result_of(done, "key")["fix"]
        assert key not in done.output

    def test_presence_timeout_fails(
        self, cli: Cli, server: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def time_out(*args: object, **options: object) -> None:
            raise RequestTimeoutError("presence: no reply")

        monkeypatch.setattr(Emitter, "presence", time_out)
        done = cli("doctor", "--channel", unique, "--key", server.key(unique, "r"), "--json")
        assert (done.code, result_of(done, "key p")["status"]) == (1, "failed")

    def test_messages_of_others_are_ignored(
        self, cli: Cli, server: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish = Emitter.publish

        async def publish_among_others(emitter: Emitter, *arguments: Any, **options: Any) -> None:
            await publish_another()
            await publish(emitter, *arguments, **options)
            await publish_another()

        async def publish_another() -> None:
            await anyio.to_thread.run_sync(lambda: server.publish(unique, "another", ttl=60))

        monkeypatch.setattr(Emitter, "publish", publish_among_others)
        done = cli("doctor", "--channel", unique, "--key", server.key(unique, "rwsl"), "--json")
        assert (done.code, statuses(done)["key w"], statuses(done)["key s"]) == (0, "ok", "ok")

    def test_undelivered_message_fails(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        backend: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def with_short_timeout(*arguments: Any, **options: Any) -> KeyChecks:
            return KeyChecks(*arguments, **{**options, "delivery_timeout": 0.01})

        # Shorten only this timeout, because a busy machine might need more for the other steps.
        monkeypatch.setattr(_doctor, "KeyChecks", with_short_timeout)
        with server.broker.lose("message"):
            done = cli(
                *("doctor", "--channel", unique, "--key", server.key(unique, "rw"), "--json"),
                *("--backend", backend),
            )
        assert (done.code, verdict_of(done)) == (1, "failed checks: delivery")

    def test_invalid_secret_fails(self, cli: Cli) -> None:
        done = cli("doctor", "--secret", "a/b", "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: secret")


class TestClock:
    @pytest.mark.parametrize("permissions", ["p", "rwsl"])
    def test_broker_clock_ahead_fails(self, cli: Cli, unique: str, permissions: str) -> None:
        with background() as ahead:
            ahead.broker.advance(100)
            key = ahead.key(unique, permissions)
            done = cli(
                "doctor", "-u", ahead.url, "--channel", unique, "-k", key, "--json", secret=False
            )
        assert (done.code, verdict_of(done)) == (1, "failed checks: clock")
        assert " s ahead of the local clock" in result_of(done, "clock")["text"]

    def test_broker_clock_behind_fails(
        self, cli: Cli, server: Background, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        local = SimpleNamespace(time=lambda: time.time() + 100, perf_counter=time.perf_counter)
        monkeypatch.setattr(_key_checks, "time", local)
        key = server.key(unique, "p")
        done = cli("doctor", "--channel", unique, "-k", key, "--json")
        assert " s behind the local clock" in result_of(done, "clock")["text"]


class TestBroker:
    def test_throttling_broker_is_noted(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        # Independently of the clock, so that a slow machine gets no further writes.
        allowed = repeat(True, 60)
        monkeypatch.setattr(Outbox, "_take_token", lambda self: next(allowed, False))
        with background(coalesce=True) as slow:
            done = cli("doctor", "--url", slow.url, "--json", secret=False)
        assert (done.code, result_of(done, "flush")["status"]) == (0, "note")
        assert "limit.flushRate" in result_of(done, "flush")["fix"]

    def test_missing_replies_fail(self, cli: Cli, server: Background) -> None:
        with server.broker.lose("reply"):
            done = cli("doctor", "--json", secret=False)
        assert (done.code, verdict_of(done)) == (1, "failed checks: flush")
        assert "0 of 100" in result_of(done, "flush")["text"]

    def test_missing_pingresp_fails(self, cli: Cli, server: Background) -> None:
        with server.broker.lose("pingresp"):
            # The earlier steps must finish within the same timeout on a busy machine.
            done = cli("doctor", "--json", "--timeout", "2")
        assert (done.code, verdict_of(done)) == (1, "failed checks: latency")

    @pytest.mark.parametrize("step", ["flush", "keygen"])
    def test_lost_connection_fails(
        self, cli: Cli, server: Background, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        async def cut(emitter: Emitter, *arguments: Any, **options: Any) -> None:
            me = (await emitter.me()).id
            server.start_soon(lambda: server.broker.drop(me))
            await anyio.sleep_forever()

        monkeypatch.setattr(Emitter, step, cut)
        done = cli("doctor", "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: connection")


@contextmanager
def cluster_with_a_paused_node() -> Iterator[Background]:
    """Run a broker, and a node of its cluster that does not answer."""
    with background(patience=0.2) as made:

        async def run(*, task_status: TaskStatus[None]) -> None:
            async with Broker(cluster=made.broker) as node:
                node.pause()
                task_status.started()
                await anyio.sleep_forever()

        stop = made.start(run)
        yield made
        stop()


class TestCluster:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(history, "_SLOW_PAGE_SECONDS", 0.19)

    @pytest.mark.parametrize("with_secret", [True, False])
    def test_missing_node_fails(
        self, cli: Cli, unique: str, with_secret: bool, backend: str
    ) -> None:
        with cluster_with_a_paused_node() as server:
            key = ["--channel", unique, "--key", server.key(unique, "rwslp")]
            if with_secret:
                key = ["--secret", server.secret]
            key += ["--backend", backend]
            done = cli("doctor", "--url", server.url, *key, "--json", secret=False)
        assert (done.code, verdict_of(done)) == (1, "failed checks: history")
        assert "does not answer: the reply took 0." in result_of(done, "history")["text"]
        if not with_secret:
            # The permission is not reported as missing because a node is.
            assert statuses(done)["key l"] == statuses(done)["key s"] == "ok"

    def test_slow_reply_is_measured_again(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = iter([False, True])

        async def read(*arguments: object) -> bool:
            return next(answers)

        monkeypatch.setattr(_cluster_checks, "_read", read)
        done = cli("doctor", "--json")
        assert (done.code, statuses(done)["history"]) == (0, "ok")
        assert list(answers) == []

    @pytest.mark.parametrize("answer", ["404", "lost connection"])
    def test_broker_without_a_cluster(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        answer: str,
        backend: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Emitter replies 404 to such a request and closes the connection."""

        async def fail(emitter: Emitter, *arguments: object) -> bool:
            if answer == "404":
                raise NotFoundError(404, "not found", operation="history")
            me = (await emitter.me()).id
            await anyio.to_thread.run_sync(server.call, lambda: server.broker.drop(me))
            await anyio.sleep_forever()
            return True

        monkeypatch.setattr(_cluster_checks, "_read", fail)
        monkeypatch.setattr(Emitter, "keyban", fail)
        key = ("--channel", unique, "--key", server.key(unique, "rw"))
        done = cli("doctor", *key, "--json", "--backend", backend)
        assert (done.code, verdict_of(done)) == (1, "failed checks: history")
        assert result_of(done, "keyban")["status"] == "note"
        for check in ("history", "keyban"):
            assert result_of(done, check)["text"].endswith("it is configured without a cluster")
        assert result_of(done, "key")["status"] == "skipped"

    def test_other_errors_fail(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(*arguments: object) -> bool:
            raise RequestTimeoutError("no reply")

        monkeypatch.setattr(_cluster_checks, "_read", fail)
        monkeypatch.setattr(Emitter, "keyban", fail)
        done = cli("doctor", "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: history, keyban")

    def test_ban_without_a_cluster_is_reported(
        self, cli: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(*arguments: object) -> bool:
            raise NotFoundError(404, "not found", operation="keyban")

        monkeypatch.setattr(Emitter, "keyban", fail)
        done = cli("ban", "k" * 32)
        assert done.code == 1
        assert done.error.startswith("cannot ban keys: the broker is configured without a cluster")


@contextmanager
def listener_that_sends(family: int, address: Any, answer: bytes) -> Iterator[Any]:
    """Listen, and send these bytes and an end of stream to the first client."""
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen()

    def answer_once() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1024):
                pass

    thread = threading.Thread(target=answer_once)
    thread.start()
    with listener:
        yield listener.getsockname()
        thread.join()


LOOPBACK = (socket.AF_INET, ("127.0.0.1", 0))


class TestConnection:
    def test_unknown_host_fails(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(*args: object, **options: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(anyio, "getaddrinfo", fail)
        done = cli("doctor", "--url", "mqtt://broker.invalid", "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: dns")
        assert result_of(done, "dns")["text"] == "broker.invalid: Name or service not known"

    def test_host_name_is_resolved(self, cli: Cli, server: Background) -> None:
        url = server.url.replace("127.0.0.1", "localhost")
        assert (
            "localhost resolved to "
            in result_of(cli("doctor", "--url", url, "--json"), "dns")["text"]
        )

    def test_closed_port_fails(self, cli: Cli, backend: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        url = f"mqtt://127.0.0.1:{port}"
        done = cli("doctor", "--url", url, "--json", "--backend", backend)
        assert (done.code, verdict_of(done)) == (1, "failed checks: tcp")
        assert result_of(done, "tcp")["text"].endswith("Connection refused")

    def test_tcp_timeout_fails(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        async def wait(*args: object, **options: object) -> None:
            await anyio.sleep_forever()

        monkeypatch.setattr(anyio, "connect_tcp", wait)
        # The DNS step must finish within the same timeout on a busy machine.
        done = cli("doctor", "--timeout", "2", "--json")
        assert result_of(done, "tcp")["text"].endswith("no reply within 2 s")

    def test_missing_unix_socket_fails(self, cli: Cli) -> None:
        done = cli("doctor", "--url", "unix:///no/such/socket", "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: socket")

    @pytest.mark.parametrize(
        ("answer", "fix"),
        [
            (b"\x20\x02\x00\x05", "use --username and --password-file"),
            (b"\x20\x02\x00\x01", ""),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "check the port"),
            (b"", "check that the port is the broker's"),
        ],
    )
    def test_connack_errors_suggest_a_fix(self, cli: Cli, answer: bytes, fix: str) -> None:
        with listener_that_sends(*LOOPBACK, answer) as (host, port):
            done = cli("doctor", "--url", f"mqtt://{host}:{port}", "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: connack")
        assert result_of(done, "connack").get("fix", "").startswith(fix)

    def test_connack_timeout_fails(self, cli: Cli, server: Background) -> None:
        with server.broker.lose("connack"):
            done = cli("doctor", "--timeout", "2", "--json")
        assert result_of(done, "connack")["text"].endswith("no reply within 2 s")

    def test_http_server_is_not_a_websocket(self, cli: Cli) -> None:
        with listener_that_sends(*LOOPBACK, b"HTTP/1.1 404 Not Found\r\n\r\n") as (host, port):
            done = cli("doctor", "--url", f"ws://{host}:{port}", "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: websocket")

    def test_refused_connection_over_websocket(self, cli: Cli, server: Background) -> None:
        with server.broker.refuse(4):
            done = cli("doctor", "--url", server.url.replace("mqtt", "ws"), "--json")
        assert statuses(done)["websocket"] == "ok"
        assert verdict_of(done) == "failed checks: connack"


class TestTls:
    def test_valid_certificate_passes(
        self, cli: Cli, secure: Background, cafile: str, backend: str
    ) -> None:
        done = cli(
            *("doctor", "--url", secure.url, "--cafile", cafile, "--json", "--backend", backend),
            secret=False,
        )
        assert done.code == 0
        assert result_of(done, "tls")["text"].startswith("TLSv1.3, certificate for 127.0.0.1")

    def test_expiring_certificate_is_noted(
        self, cli: Cli, secure: Background, cafile: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_connection_checks, "_EXPIRY_NOTE_SECONDS", float("inf"))
        done = cli("doctor", "--url", secure.url, "--cafile", cafile, "--json", secret=False)
        assert (done.code, result_of(done, "tls")["status"]) == (0, "note")

    def test_private_authority_fails(self, cli: Cli, secure: Background) -> None:
        done = cli("doctor", "--url", secure.url, "--json")
        assert (done.code, verdict_of(done)) == (1, "failed checks: tls")
        assert "use --cafile FILE to trust" in result_of(done, "tls")["fix"]

    def test_wrong_host_name_fails(self, cli: Cli, cafile: str) -> None:
        with broker_with_certificate_for("elsewhere.example") as url:
            done = cli("doctor", "--url", url, "--cafile", cafile, "--json")
        assert "connect to a host name in the certificate" in result_of(done, "tls")["fix"]

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "wrong version number"),
            (b"", "the peer closed the connection during the handshake"),
        ],
    )
    def test_port_without_tls_fails(self, cli: Cli, answer: bytes, text: str) -> None:
        with listener_that_sends(*LOOPBACK, answer) as (host, port):
            done = cli("doctor", "--url", f"mqtts://{host}:{port}", "--json")
        assert result_of(done, "tls")["text"] in (text, "record layer failure")

    def test_tls_timeout_fails(self, cli: Cli) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"mqtts://127.0.0.1:{listener.getsockname()[1]}"
            done = cli("doctor", "--url", url, "--timeout", "2", "--json")
        assert result_of(done, "tls")["text"] == "no reply within 2 s"


@contextmanager
def broker_with_certificate_for(name: str) -> Iterator[str]:
    """Run a broker with a certificate for another host name, and yield its URL."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal("trio") as portal:
        broker = Broker(ssl_context=tls.server_context(name))
        with portal.wrap_async_context_manager(broker):
            yield broker.url


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--key", "x"], "--key requires --channel"),
            (["--need", "r"], "--need requires --channel"),
            (["--need", "rz", "--channel", "a/"], "expected letters out of r"),
        ],
    )
    def test_invalid_options_are_rejected(
        self, cli: Cli, arguments: list[str], expected: str
    ) -> None:
        done = cli("doctor", *arguments)
        assert done.code == 2
        assert expected in done.error
