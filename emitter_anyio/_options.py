"""What ``connect()`` takes: a mapping or a URL, and keywords, made into one checked value."""

from __future__ import annotations

import logging
import math
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final, Literal
from urllib.parse import quote, unquote, urlsplit

from anyio.abc import ByteStreamConnectable

from ._backoff import Backoff
from ._channels import is_number, is_whole
from ._messages import Will
from ._router import Matcher

DEFAULT_HOST: Final = "api.emitter.io"
PORTS: Final = {"mqtt": 8080, "mqtts": 443, "ws": 8080, "wss": 443}
"""Emitter's own ports, where MQTT's would be 1883 and 8883."""

_PATH: Final = "/%:@!$&'()*+,;=~"
"""What stands for itself in a path, beside letters and digits (RFC 3986)."""

MAX_KEEPALIVE: Final = 60
"""The broker drops a link that is silent for 120 s, whatever CONNECT says (its ``conn.go``)."""


_BACKOFF: Final = Backoff()


@dataclass(frozen=True, slots=True)
class Server:
    """
    Where a broker listens.

    :ivar scheme: ``"mqtt"``, ``"mqtts"``, ``"ws"``, ``"wss"`` or ``"unix"``; ``"connectable"``
        where a connectable knows the way
    :ivar host: a name, an address, or the path of a Unix socket
    :ivar port: the port, 0 where there is none
    :ivar path: for WebSocket, what is asked for, quoted; else empty
    """

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def secure(self) -> bool:
        """Whether it is reached by TLS."""
        return self.scheme in ("mqtts", "wss")

    @property
    def websocket(self) -> bool:
        """Whether it is reached by WebSocket."""
        return self.scheme in ("ws", "wss")

    def __str__(self) -> str:
        if self.scheme == "connectable":
            return "the connectable"
        if self.scheme == "unix":
            return f"unix://{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        path = "" if self.path == "/" else self.path
        return f"{self.scheme}://{host}:{self.port}{path}"


@dataclass(frozen=True, slots=True, repr=False)
class Options:
    """Everything that can be said about a client; see :func:`~emitter_anyio.connect`."""

    servers: tuple[Server, ...]
    keepalive: float = 30
    username: str | None = None
    password: str | None = None
    client_id: str = ""
    will: Will | None = None
    ssl_context: ssl.SSLContext | None = None
    connect_timeout: float | None = 10
    request_timeout: float | None = 10
    disconnect_timeout: float = 5
    matcher: Matcher = "emitter"
    max_message_size: int = 65536
    allow_collisions: bool = False
    connectable: ByteStreamConnectable | None = None
    reconnect: Backoff | None = _BACKOFF
    while_down: Literal["wait", "raise"] = "wait"


logger = logging.getLogger("emitter_anyio")

_PLACE: Final = ("host", "port", "secure", "servers")


def make_options(options: Mapping[str, Any] | str | None, keywords: Mapping[str, Any]) -> Options:
    """
    Check everything and put it together.

    :raises TypeError: if an option is unknown, of the wrong kind, or said twice with two values
    :raises ValueError: if a value is out of its range
    :raises ImportError: if WebSocket is wanted, and wsproto is not there
    """
    said: dict[str, Any] = {}
    server: Server | None = None
    origin = "the mapping"
    if isinstance(options, str):
        server, said = _parse_url(options)
        said |= _place_of(server)
        origin = "the URL"
    elif isinstance(options, Mapping):
        said = dict(options)
    elif options is not None:
        raise TypeError(
            f"connect() takes a URL or a mapping of options, not {type(options).__name__}"
        )
    for name, value in keywords.items():
        if name in said and said[name] != value:
            raise TypeError(f"{origin} and the keyword disagree about {name!r}: say it once")
        said[name] = value
    for name in said:
        if name not in _CHECKS and name not in _PLACE:
            raise TypeError(
                f"unknown option {name!r}; there are {', '.join(sorted((*_PLACE, *_CHECKS)))}"
            )
    place: dict[str, Any] = {name: said.pop(name) for name in _PLACE if name in said}
    if said.get("connectable") is not None and not place:
        made = Options(servers=(Server("connectable", "", 0),), **said)
    else:
        made = Options(servers=_servers(place, server), **said)
    _check(made, said)
    return made


def _servers(place: dict[str, Any], of_url: Server | None) -> tuple[Server, ...]:
    urls = place.pop("servers", None)
    if urls is not None:
        if place:
            raise TypeError(f"servers stands instead of {', '.join(place)}: give only one of them")
        return _parse_servers(urls)
    secure = place.get("secure", True)
    if not isinstance(secure, bool):
        raise TypeError(f"secure is a bool, not {type(secure).__name__}")
    scheme = "mqtts" if secure else "mqtt"
    host = place.get("host", DEFAULT_HOST)
    if not isinstance(host, str):
        raise TypeError(f"host is a str, not {type(host).__name__}")
    if not host:
        raise ValueError("host is empty")
    if host.startswith("/"):
        return (Server("unix", host, 0),)
    server = Server(scheme, host, _check_port(place.get("port", PORTS[scheme])))
    # No keyword disagrees with a URL, which may say more: WebSocket, and a path.
    return (of_url or server,)


def _check_port(port: Any) -> int:
    if not is_whole(port):
        raise TypeError(f"port is a whole number, not {type(port).__name__}")
    if not 1 <= port <= 65535:
        raise ValueError(f"port is from 1 to 65535, not {port}")
    return int(port)


def _parse_servers(urls: object) -> tuple[Server, ...]:
    if isinstance(urls, str) or not isinstance(urls, Sequence):
        raise TypeError("servers is a sequence of URLs")
    servers = []
    for url in urls:
        server, credentials = _parse_url(url)
        if credentials:
            raise TypeError("a URL in servers has no user and password: give them as options")
        servers.append(server)
    if not servers:
        raise ValueError("servers is empty")
    if len({server.scheme for server in servers}) > 1:
        raise ValueError("the URLs in servers are of one scheme")
    return tuple(servers)


def _parse_url(url: object) -> tuple[Server, dict[str, Any]]:
    # The URL itself is in no message, since it may carry a password.
    if not isinstance(url, str):
        raise TypeError(f"a URL is a str, not {type(url).__name__}")
    try:
        parts = urlsplit(url)
    except ValueError:
        # Its own words may show the password.
        raise ValueError("the URL is none: there is something wrong with its host") from None
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
            raise ValueError("a Unix socket's URL is unix:///path/to/socket")
        return Server("unix", unquote(parts.path), 0), {}
    if parts.scheme not in PORTS:
        raise ValueError(
            f"the URL's scheme is {parts.scheme!r}; there are mqtt, mqtts, ws, wss and unix, such "
            "as mqtt://127.0.0.1:8080"
        )
    websocket = parts.scheme in ("ws", "wss")
    if (parts.path not in ("", "/") and not websocket) or parts.query or parts.fragment:
        where = "its path" if websocket else "host and port"
        raise ValueError(f"the URL ends after {where}; channels and keys go to the calls")
    host = parts.hostname
    if not host:
        raise ValueError("the URL has no host")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the URL's port is no number from 1 to 65535") from None
    credentials = {}
    if parts.username is not None:
        credentials["username"] = unquote(parts.username)
    if parts.password is not None:
        credentials["password"] = unquote(parts.password)
    port = _check_port(PORTS[parts.scheme] if port is None else port)
    path = quote(parts.path or "/", safe=_PATH) if websocket else ""
    return Server(parts.scheme, host, port, path), credentials


def _place_of(server: Server) -> dict[str, Any]:
    if server.scheme == "unix":
        return {"host": server.host}
    return {"host": server.host, "port": server.port, "secure": server.secure}


def _check(options: Options, said: Mapping[str, object]) -> None:
    # The defaults are good.
    for name, value in said.items():
        _CHECKS[name](name, value)
    if options.password is not None and options.username is None:
        raise TypeError("a password needs a username: MQTT 3.1.1 sends none without the other")
    if options.ssl_context is not None:
        if options.connectable is not None or not options.servers[0].secure:
            raise TypeError(
                "ssl_context is for TLS: it needs secure=True, mqtts:// or wss://, and no "
                "connectable"
            )
        _check_trust(options.ssl_context)
    if options.servers[0].websocket:
        _check_websocket()


def _check_seconds(name: str, value: object, least: float = 0, most: float = math.inf) -> None:
    if not is_number(value):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
    if not least <= value <= most:
        limits = f"from {least} to {most}" if most < math.inf else f"at least {least}"
        raise ValueError(f"{name} is {limits} seconds, not {value}")


def _check_timeout(name: str, value: object) -> None:
    if value is not None:
        _check_seconds(name, value)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is a str, not {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name} has no UTF-8") from None
    if size > 65535:
        raise ValueError(f"{name} has at most 65535 bytes")


def _check_credential(name: str, value: object) -> None:
    if value is not None:
        _check_text(name, value)


def _check_is(kind: type, what: str, *, optional: bool = True) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if not isinstance(value, kind) and not (optional and value is None):
            raise TypeError(f"{name} is {what}, not {type(value).__name__}")

    return check


def _check_one_of(*values: str) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if value not in values:
            raise ValueError(f"{name} is {' or '.join(map(repr, values))}, not {value!r}")

    return check


def _check_size(name: str, value: object) -> None:
    if not is_whole(value):
        raise TypeError(f"{name} is a whole number, not {type(value).__name__}")
    if not 1024 <= value <= 0xFFFFFFF:
        raise ValueError(f"{name} is from 1024 to {0xFFFFFFF} bytes, not {value}")


_CHECKS: Final[Mapping[str, Callable[[str, object], None]]] = {
    "keepalive": partial(_check_seconds, least=1, most=MAX_KEEPALIVE),
    "username": _check_credential,
    "password": _check_credential,
    "client_id": _check_text,
    "will": _check_is(Will, "a Will(key, channel, message)"),
    "ssl_context": _check_is(ssl.SSLContext, "an ssl.SSLContext"),
    "connect_timeout": _check_timeout,
    "request_timeout": _check_timeout,
    "disconnect_timeout": _check_seconds,
    "matcher": _check_one_of("emitter", "mqtt"),
    "max_message_size": _check_size,
    "allow_collisions": _check_is(bool, "a bool", optional=False),
    "connectable": _check_is(ByteStreamConnectable, "an anyio.abc.ByteStreamConnectable"),
    "reconnect": _check_is(Backoff, "a Backoff(), or None for one link only"),
    "while_down": _check_one_of("wait", "raise"),
}


def _check_trust(context: ssl.SSLContext) -> None:
    if context.protocol is ssl.PROTOCOL_TLS_SERVER:
        raise ValueError(
            "ssl_context is one for servers: a client's is made by ssl.create_default_context()"
        )
    if context.verify_mode is ssl.CERT_NONE:
        logger.warning(
            "the broker's identity is not checked: ssl_context takes any certificate (CERT_NONE)"
        )
    elif not context.check_hostname:
        logger.warning(
            "the broker's identity is not checked: ssl_context takes a certificate for any host "
            "name (check_hostname=False)"
        )


def _check_websocket() -> None:
    # It is loaded here, where the event loop need not be running yet.
    try:
        import_module("wsproto")
    except ImportError as exc:
        raise ImportError(
            "ws:// and wss:// need wsproto: pip install 'emitter_anyio[websocket]'", name="wsproto"
        ) from exc
