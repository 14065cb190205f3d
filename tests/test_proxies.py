"""The recipes of ``docs/connecting.md``: connecting through HTTP and SOCKS5 proxies."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest
from anyio import DelimiterNotFound, IncompleteRead
from anyio.abc import ByteStream, ByteStreamConnectable

from emitter_anyio import ConnectError, Emitter
from emitter_anyio.testing import Broker
from tests.support import tls
from tests.support.connections import connect_once, connect_reconnecting, while_disconnected
from tests.support.pages import defined_by
from tests.support.proxies import (
    TARGET,
    ClosingProxyServer,
    HTTPProxyServer,
    Proxy,
    SOCKSProxyServer,
)

LOGIN: Final = ("ann", "a secret: ü")


@dataclass
class Recipe:
    """A connectable of the page, and the server that it needs."""

    connectable: type[ByteStreamConnectable]
    server: Callable[..., Proxy]

    def connect_through(
        self, proxy: Proxy, target: str = TARGET, login: tuple[str, str] | None = None
    ) -> Any:
        return self.connectable("127.0.0.1", proxy.port, target, login)  # type: ignore[call-arg]  # defined on the page


RECIPES: Final = {
    name: Recipe(defined_by("connecting.md", f"class {name}(")[name], server)
    for name, server in {"HTTPProxy": HTTPProxyServer, "SOCKSProxy": SOCKSProxyServer}.items()
}


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]


@pytest.fixture(params=["mqtt", "mqtts", "ws", "wss"])
def scheme(request: pytest.FixtureRequest) -> str:
    scheme: str = request.param
    return scheme


@pytest.fixture
async def broker(anyio_backend: object, scheme: str) -> AsyncIterator[Broker]:
    secure = scheme in ("mqtts", "wss")
    context = tls.server_context("broker.example") if secure else None
    async with Broker(ssl_context=context) as broker:
        yield broker


def client_options(scheme: str) -> dict[str, Any]:
    return {"ssl_context": tls.client_context()} if scheme in ("mqtts", "wss") else {}


async def exchange(emitter: Emitter, key: str) -> None:
    """Send a message through the broker that is larger than one read."""
    async with emitter.subscribe(key, "a/") as messages:
        await emitter.publish(key, "a/", bytes(60_000), qos=1)
        assert (await messages.receive()).binary == bytes(60_000)


@pytest.mark.parametrize("login", [None, LOGIN])
async def test_client_connects_and_reconnects_through_proxy(
    broker: Broker, scheme: str, recipe: Recipe, login: tuple[str, str] | None
) -> None:
    proxy, key = recipe.server((broker.host, broker.port), login), broker.keygen("a/", "rw")
    async with proxy.serve():
        connectable = recipe.connect_through(proxy, login=login)
        async with connect_reconnecting(
            f"{scheme}://broker.example", connectable=connectable, **client_options(scheme)
        ) as emitter:
            await exchange(emitter, key)
            async with while_disconnected(emitter, broker):
                pass
            await exchange(emitter, key)
            assert emitter.statistics().connections == 2
    assert len(proxy.targets) >= 2
    assert set(proxy.targets) == {TARGET}


@pytest.mark.parametrize("scheme", ["mqtts", "wss"])
async def test_certificate_is_checked_against_host_of_url(
    broker: Broker, scheme: str, recipe: Recipe
) -> None:
    proxy = recipe.server((broker.host, broker.port))
    async with proxy.serve():
        with pytest.raises(ConnectError) as caught:
            async with connect_once(
                f"{scheme}://other.example",
                connectable=recipe.connect_through(proxy),
                **client_options(scheme),
            ):
                raise AssertionError("entered")
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


@pytest.mark.parametrize("scheme", ["mqtt"])
@pytest.mark.parametrize("wrong", [None, ("ann", "wrong"), ("bob", LOGIN[1])])
async def test_missing_or_wrong_login_raises_connect_error(
    broker: Broker, recipe: Recipe, wrong: tuple[str, str] | None
) -> None:
    proxy = recipe.server((broker.host, broker.port), LOGIN)
    async with proxy.serve():
        connectable = recipe.connect_through(proxy, login=wrong)
        with pytest.raises(ConnectError, match=r"the proxy (refused|requires)") as caught:
            async with connect_once("mqtt://broker.example", connectable=connectable):
                raise AssertionError("entered")
    assert LOGIN[1] not in str(caught.value)
    assert proxy.targets == []


@pytest.mark.parametrize("scheme", ["mqtt"])
async def test_unknown_target_raises_connect_error(broker: Broker, recipe: Recipe) -> None:
    proxy = recipe.server((broker.host, broker.port))
    async with proxy.serve():
        connectable = recipe.connect_through(proxy, "unknown.example:1")
        with pytest.raises(ConnectError, match=r"the proxy (refused|could not).*(502|error 4)"):
            async with connect_once("mqtt://unknown.example", connectable=connectable):
                raise AssertionError("entered")
    assert proxy.targets == ["unknown.example:1"]


async def test_proxy_that_closes_during_handshake_raises_connect_error(
    anyio_backend: object, recipe: Recipe
) -> None:
    proxy = ClosingProxyServer(("127.0.0.1", 1))
    async with proxy.serve():
        connectable = recipe.connect_through(proxy)
        with pytest.raises(ConnectError, match="closed before the read operation") as caught:
            async with connect_once("mqtt://broker.example", connectable=connectable):
                raise AssertionError("entered")
    assert isinstance(caught.value.__cause__, IncompleteRead)


async def test_unreachable_proxy_raises_connect_error(
    anyio_backend: object, recipe: Recipe
) -> None:
    proxy = recipe.server(("127.0.0.1", 1))
    async with proxy.serve():
        connectable = recipe.connect_through(proxy)
    with pytest.raises(ConnectError, match=r"broker\.example"):
        async with connect_once("mqtt://broker.example", connectable=connectable):
            raise AssertionError("entered")


@pytest.mark.parametrize("scheme", ["mqtt"])
@pytest.mark.parametrize("bound", [b"\x04" + bytes(16), b"\x03\x09localhost"])
async def test_socks_proxy_may_reply_with_any_kind_of_address(broker: Broker, bound: bytes) -> None:
    recipe = RECIPES["SOCKSProxy"]
    proxy, key = SOCKSProxyServer((broker.host, broker.port)), broker.keygen("a/", "rw")
    proxy.bound = bound
    async with proxy.serve():
        connectable = recipe.connect_through(proxy)
        async with connect_once("mqtt://broker.example", connectable=connectable) as emitter:
            await exchange(emitter, key)


class Failing(ByteStreamConnectable):
    """Raises an exception of AnyIO's buffered streams."""

    async def connect(self) -> ByteStream:
        raise DelimiterNotFound(5)


async def test_delimiter_not_found_raises_connect_error(anyio_backend: object) -> None:
    with pytest.raises(ConnectError, match="first 5 bytes"):
        async with connect_once("mqtt://h", connectable=Failing()):
            raise AssertionError("entered")
