from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream, ByteStreamConnectable

from emitter_anyio import ClosedError, ConnectError, Emitter, Will, connect
from tests.client.tools import checkpoints, relay
from tests.support.server import Server

pytestmark = pytest.mark.emitter

FORMS: dict[str, Callable[[Server], Emitter]] = {
    "the mapping of the original SDK": lambda server: connect(
        {"host": server.host, "port": server.port, "secure": server.secure, "keepalive": 30}
    ),
    "keywords": lambda server: connect(host=server.host, port=server.port, secure=server.secure),
    "a mapping and keywords": lambda server: connect(
        {"host": server.host, "port": server.port}, secure=server.secure, keepalive=60
    ),
    "a URL": lambda server: connect(server.url),
    "a URL and keywords": lambda server: connect(server.url, keepalive=1, client_id="one"),
    "a URL and a keyword that agrees": lambda server: connect(server.url, port=server.port),
    "a URL with a user": lambda server: connect(server.url.replace("://", "://bob:hunter2@")),
}


@pytest.mark.parametrize("form", FORMS)
async def test_connect_accepts(form: str, server: Server) -> None:
    async with FORMS[form](server) as emitter:
        assert emitter.state == "connected"
        assert (await emitter.me()).id


async def test_connect_to_a_unix_socket_by_url(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "emitter")
    async with relay(server, path), connect(f"unix://{path}") as emitter:
        assert (await emitter.me()).id
        assert emitter.connection is not None
        assert emitter.connection.server == f"unix://{path}"


async def test_connect_to_a_unix_socket_by_path_as_host(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "emitter")
    async with relay(server, path), connect(host=path) as emitter:
        assert (await emitter.me()).id


async def test_connect_through_a_connectable(server: Server) -> None:
    connectable = anyio.as_connectable((server.host, server.port), tls=server.secure)
    async with connect(connectable=connectable) as emitter:
        assert (await emitter.me()).id


async def test_connect_opens_nothing_before_entering() -> None:
    class Never(ByteStreamConnectable):
        async def connect(self) -> ByteStream:
            raise AssertionError

    emitter = connect(connectable=Never())
    assert emitter.state == "closed"
    assert emitter.connection is None


def test_connect_outside_an_event_loop_uses_the_original_sdks_defaults() -> None:
    assert "mqtts://api.emitter.io:443" in repr(connect())
    assert "mqtt://api.emitter.io:8080" in repr(connect({"secure": False}))


async def test_connection_has_server_and_start_time(server: Server) -> None:
    before = datetime.now(UTC)
    async with connect(server.url.replace("://", "://bob:hunter2@")) as emitter:
        connection = emitter.connection
        assert connection is not None
        assert connection.server.endswith(f"://{server.host}:{server.port}")
        assert before <= connection.since <= datetime.now(UTC)
        assert connection.last_error is None
    assert emitter.connection is None


async def test_connection_id_is_set_by_me(emitter: Emitter) -> None:
    assert emitter.connection is not None
    assert emitter.connection.id is None
    me = await emitter.me()
    assert emitter.connection.id == me.id


async def test_will_is_published_when_the_client_leaves(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        async with connect(server.other_url, will=Will(key, unique, "gone")):
            pass
        message = await messages.receive()
    assert message.as_string() == "gone"


async def test_connect_error_names_the_server_and_emitters_ports() -> None:
    with socket.socket() as unlistened:
        unlistened.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"mqtt://127.0.0.1:{unlistened.getsockname()[1]}"
        with pytest.raises(ConnectError, match="8080") as caught:
            async with connect(url):
                pytest.fail("connected")
    assert url in str(caught.value)
    assert isinstance(caught.value.causes[url], OSError)


async def test_client_can_be_entered_again_after_connect_error(
    server: Server, tmp_path: Path
) -> None:
    path = str(tmp_path / "emitter")
    emitter = connect(host=path)
    with pytest.raises(ConnectError):
        async with emitter:
            pytest.fail("connected")
    assert emitter.state == "closed"
    async with relay(server, path), emitter:
        assert (await emitter.me()).id


async def test_wait_connected_raises_when_connecting_fails() -> None:
    emitter = connect(host="/there/is/no/such/socket")

    async def wait() -> None:
        with pytest.raises(ClosedError):
            await emitter.wait_connected()
        ended.set()

    ended = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await checkpoints()
        with pytest.raises(ConnectError):
            async with emitter:
                pytest.fail("connected")
        await ended.wait()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"hots": "x"}, "'hots'.*host"),
        ({"port": 65536}, "port.*1 to 65535.*65536"),
        ({"port": "8080"}, "port.*str"),
        ({"keepalive": 61}, "keepalive.*1 to 60"),
        ({"secure": "yes"}, "secure.*str"),
        ({"host": ""}, "host.*empty"),
        ({"request_timeout": -1}, "request_timeout.*-1"),
        ({"matcher": "emqx"}, "matcher.*'emitter' or 'mqtt'"),
        ({"password": "hunter2"}, "password.*username"),
        ({"will": "bye"}, "will.*Will"),
    ],
)
def test_connect_names_a_bad_option(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises((TypeError, ValueError), match=pattern):
        connect(options)
    with pytest.raises((TypeError, ValueError), match=pattern):
        connect(**options)


@pytest.mark.parametrize(
    ("url", "pattern"),
    [
        ("http://127.0.0.1", "scheme"),
        ("mqtt://", "host"),
        ("mqtt://127.0.0.1:99999", "port"),
        ("mqtt://127.0.0.1/chat/", "host and port"),
    ],
)
def test_connect_explains_a_bad_url(url: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        connect(url)


def test_connect_rejects_a_url_that_contradicts_a_keyword() -> None:
    with pytest.raises(TypeError, match="'port'"):
        connect("mqtt://127.0.0.1:8080", port=8081)
