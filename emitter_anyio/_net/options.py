"""What ``connect()`` takes: a mapping or a URL, and keywords, made into one checked value."""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from ipaddress import IPv6Address
from typing import Any, Final, Literal, TypeAlias, cast
from urllib.parse import quote, unquote, urlsplit

from anyio.abc import ByteStreamConnectable

from emitter_anyio._values.backoff import Backoff
from emitter_anyio._values.channels import PLACEHOLDER_KEY, format_topic
from emitter_anyio._values.checks import (
    check_choice,
    check_flag,
    check_function,
    check_int,
    check_seconds,
    check_text,
)
from emitter_anyio._values.errors import MessageTooLargeError
from emitter_anyio._values.messages import encode_payload
from emitter_anyio._values.router import Matcher
from emitter_anyio._values.will import Will

DEFAULT_HOST: Final = "api.emitter.io"
PORTS: Final = {"mqtt": 8080, "mqtts": 443, "ws": 8080, "wss": 443}
"""Emitter's own ports, where MQTT's would be 1883 and 8883."""

_SAFE_IN_PATH: Final = "/%:@!$&'()*+,;=~"
"""What stands for itself in a path, beside letters and digits (RFC 3986)."""

_INVALID_IN_HOST: Final = re.compile(r"[\x00-,/:-@\[-^`{-\x7f\s]")
"""What no host name has; what is not ASCII may be a part of an international one."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")

_MISPLACED_AT: Final = re.compile(r"://.*[/?#\[\]].*@", re.DOTALL)
"""An ``@`` where a user and a password have ended already."""

_MAX_FIELD_BYTES: Final = 65535
"""MQTT counts the bytes of each text and of a will's payload in 16 bits."""

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
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        path = "" if self.path == "/" else self.path
        return f"{self.scheme}://{host}:{self.port}{path}"


TraceHook: TypeAlias = Callable[[str, Mapping[str, object]], object]
"""Gets the name of an event and what is known of it."""


@dataclass(frozen=True, slots=True, repr=False)
class Options:
    """Everything that can be given about a client; see :func:`~emitter_anyio.connect`."""

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
    trace: TraceHook | None = None


logger = logging.getLogger("emitter_anyio")

_Check: TypeAlias = Callable[[str, object], Any]
"""Takes the name and the value of an option; returns the plain value, or raises."""


def make_options(options: Mapping[str, Any] | str | None, keywords: Mapping[str, Any]) -> Options:
    """
    Check everything and put it together.

    :raises TypeError: if an option is unknown, of the wrong kind, or given twice with two values
    :raises ValueError: if a value is out of its range
    :raises ImportError: if WebSocket is wanted, and wsproto is not there
    """
    server: Server | None = None
    first: dict[Any, object] = {}
    origin = "the mapping"
    if isinstance(options, str):
        server, credentials = _parse_url("URL", options)
        first = credentials | _address_options(server)
        origin = "the URL"
    elif isinstance(options, Mapping):
        first = dict(options)
    elif options is not None:
        raise TypeError(
            f"connect() takes a URL or a mapping of options, not {type(options).__name__}"
        )
    given: dict[str, Any] = {}
    for name, value in (*first.items(), *keywords.items()):
        check = _OTHER_CHECKS.get(name) or _ADDRESS_CHECKS.get(name)
        if check is None:
            known = ", ".join(sorted((*_ADDRESS_CHECKS, *_OTHER_CHECKS)))
            raise TypeError(f"unknown option {name!r}; there are {known}")
        checked = check(name, value)
        if name in given and given[name] != checked:
            raise TypeError(f"{origin} and the keyword disagree about {name!r}: say it once")
        given[name] = checked
    address: dict[str, Any] = {name: given.pop(name) for name in _ADDRESS_CHECKS if name in given}
    if given.get("connectable") is not None and not address:
        made = Options(servers=(Server("connectable", "", 0),), **given)
    else:
        secure = given.get("connectable") is None
        made = Options(servers=_servers(address, server, secure=secure), **given)
    _check_together(made)
    return made


def _servers(
    address: dict[str, Any], url_server: Server | None, *, secure: bool
) -> tuple[Server, ...]:
    """
    Return the servers that the options name.

    :param secure: whether TLS is used unless the options say so
    """
    servers: tuple[Server, ...] | None = address.pop("servers", None)
    if servers is not None:
        if address:
            raise TypeError(
                f"servers stands instead of {', '.join(address)}: give only one of them"
            )
        return servers
    scheme = "mqtts" if address.get("secure", secure) else "mqtt"
    host = address.get("host", DEFAULT_HOST)
    if host.startswith("/"):
        return (Server("unix", host, 0),)
    server = Server(scheme, host, address.get("port", PORTS[scheme]))
    # No keyword disagrees with a URL, which may say more: WebSocket, and a path.
    return (url_server or server,)


def _check_host_or_path(name: str, value: object) -> str:
    host = check_text(name, value)
    if not host.startswith("/"):
        return _check_host(name, host)
    try:
        invalid = b"\0" in os.fsencode(host)
    except UnicodeEncodeError:
        invalid = True
    if invalid:
        raise ValueError(f"invalid {name}: the path of a Unix socket has a character no path has")
    return host


def _check_host(name: str, host: str) -> str:
    # The host itself is in no message, because it may be a URL with a password.
    if not host:
        raise ValueError(f"{name} is empty")
    if "://" in host:
        why = "it is a URL; pass that as the first argument of connect(), or use the host alone"
    elif "@" in host:
        why = "it contains '@'; use username= and password= for the credentials"
    elif host.startswith("["):
        why = "it has brackets, which only a URL needs; use host='::1' and port= for the port"
    elif ":" not in host:
        if not (bad := _INVALID_IN_HOST.search(host)):
            return _check_utf8(name, host)
        why = f"it contains {bad[0]!r}, which no host name has; use the name or address alone"
    elif (address := host.partition("%"))[0].count(":") == 1:
        why = "it contains a port; use port= for that"
    else:
        try:
            IPv6Address(host)
        except ValueError:
            why = "it contains ':', but is not an IPv6 address"
        else:
            if not _INVALID_IN_HOST.search(address[2]):
                return _check_utf8(name, host)
            why = "its zone must be the name or number of a network interface"
    raise ValueError(f"invalid {name}: {why}")


def _check_servers(name: str, urls: object) -> tuple[Server, ...] | None:
    if urls is None:
        return None
    if isinstance(urls, str) or not isinstance(urls, Sequence):
        raise TypeError("servers is a sequence of URLs")
    servers = []
    for url in urls:
        server, credentials = _parse_url("URL in servers", url)
        if credentials:
            raise TypeError("a URL in servers has no user and password: give them as options")
        servers.append(server)
    if not servers:
        raise ValueError("servers is empty")
    if len({server.scheme for server in servers}) > 1:
        raise ValueError("the URLs in servers are of one scheme")
    return tuple(servers)


def _parse_url(name: str, value: object) -> tuple[Server, dict[str, Any]]:
    # The URL itself is in no message, since it may carry a password.
    url = check_text(f"a {name}", value)
    try:
        return _split_url(url)
    except ValueError as exc:
        hint = ""
        if _MISPLACED_AT.search(url):
            hint = (
                "; if the user or the password contains one of / ? # [ ], quote it: "
                "urllib.parse.quote(password, safe='')"
            )
        raise ValueError(f"{exc}{hint}") from None


def _split_url(url: str) -> tuple[Server, dict[str, Any]]:
    # urlsplit() would leave them out.
    if _CONTROL.search(url):
        raise ValueError("invalid URL: it contains a control character, such as a line break")
    _check_utf8("URL", url)
    try:
        parts = urlsplit(url)
    except ValueError:
        # Its own words may show the password.
        raise ValueError("invalid URL: the host part is malformed") from None
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
            raise ValueError("a Unix socket's URL is unix:///path/to/socket")
        return Server("unix", _check_host_or_path("path", _unquote("path", parts.path)), 0), {}
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
    # In a URL the zone of an address stands behind a quoted percent sign (RFC 6874).
    host = _check_host("host in the URL", host.replace("%25", "%", 1) if ":" in host else host)
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the URL's port is no number from 1 to 65535") from None
    credentials = {}
    if parts.username is not None:
        credentials["username"] = _unquote("user name", parts.username)
    if parts.password is not None:
        credentials["password"] = _unquote("password", parts.password)
    port = _check_port("port", PORTS[parts.scheme] if port is None else port)
    path = quote(parts.path or "/", safe=_SAFE_IN_PATH) if websocket else ""
    return Server(parts.scheme, host, port, path), credentials


def _unquote(what: str, text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(
            f"invalid URL: the percent escapes of its {what} are not UTF-8; quote it: "
            "urllib.parse.quote(text, safe='')"
        ) from None


def _address_options(server: Server) -> dict[str, Any]:
    if server.scheme == "unix":
        return {"host": server.host}
    return {"host": server.host, "port": server.port, "secure": server.secure}


def _check_together(options: Options) -> None:
    if options.password is not None and options.username is None:
        raise TypeError("a password needs a username: MQTT 3.1.1 sends none without the other")
    if options.ssl_context is not None:
        if not options.servers[0].secure:
            raise TypeError("ssl_context is for TLS: it needs secure=True, mqtts:// or wss://")
        _check_trust(options.ssl_context)
    check_connect_size(options)
    if options.servers[0].websocket:
        _check_websocket()


def check_connect_size(options: Options, will_key: str | None = None) -> None:
    """
    Check that the broker can take the CONNECT packet.

    :param will_key: what the function has returned that gives the key of the will, once it has
    :raises MessageTooLargeError: if the packet, or the message of the will, has too many bytes
    :raises ValueError: if the message of the will cannot be encoded
    :raises TypeError: if the message of the will cannot be encoded
    """
    fields = [
        text.encode()
        for text in (options.client_id, options.username, options.password)
        if text is not None
    ]
    if (will := options.will) is not None:
        payload = encode_payload(will.message)
        if len(payload) > _MAX_FIELD_BYTES:
            raise MessageTooLargeError(
                f"cannot use the will: its message has {len(payload)} bytes; MQTT allows "
                f"{_MAX_FIELD_BYTES}"
            )
        key = will_key or (will.key if isinstance(will.key, str) else PLACEHOLDER_KEY)
        fields += [format_topic(key, will.channel).encode(), payload]
    # Protocol, version, flags and keepalive have 10 bytes; each field has its length in front.
    size = 10 + 2 * len(fields) + sum(map(len, fields))
    if size > options.max_message_size:
        raise MessageTooLargeError(
            f"cannot connect: client_id, username, password and will make a CONNECT of {size} "
            f"bytes; the broker takes {options.max_message_size} (max_message_size)"
        )


_check_port = partial(check_int, least=1, most=65535)


def _check_timeout(name: str, value: object) -> float | None:
    return None if value is None else check_seconds(name, value)


def _check_utf8(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as exc:
        raise ValueError(f"{name} has no UTF-8: {exc.reason}") from None
    if size > _MAX_FIELD_BYTES:
        raise ValueError(f"{name} has at most {_MAX_FIELD_BYTES} bytes")
    return text


def _check_string(name: str, value: object) -> str:
    text = _check_utf8(name, check_text(name, value))
    if "\0" in text:
        raise ValueError(f"{name} contains a NUL character, which MQTT does not allow")
    return text


def _check_username(name: str, value: object) -> str | None:
    return None if value is None else _check_string(name, value)


def _check_password(name: str, value: object) -> str | None:
    return None if value is None else _check_utf8(name, check_text(name, value))


def _check_is(kind: type, what: str) -> _Check:
    def check(name: str, value: object) -> object:
        if not isinstance(value, kind) and value is not None:
            raise TypeError(f"{name} is {what}, not {type(value).__name__}")
        return value

    return check


_ADDRESS_CHECKS: Final[Mapping[str, _Check]] = {
    "host": _check_host_or_path,
    "port": _check_port,
    "secure": check_flag,
    "servers": _check_servers,
}


def _check_trace(name: str, value: object) -> TraceHook | None:
    if value is None:
        return None
    return check_function(name, cast("TraceHook", value))


_OTHER_CHECKS: Final[Mapping[str, _Check]] = {
    "keepalive": partial(check_seconds, least=1, most=MAX_KEEPALIVE),
    "username": _check_username,
    "password": _check_password,
    "client_id": _check_string,
    "will": _check_is(Will, "a Will(key, channel, message)"),
    "ssl_context": _check_is(ssl.SSLContext, "an ssl.SSLContext"),
    "connect_timeout": _check_timeout,
    "request_timeout": _check_timeout,
    "disconnect_timeout": check_seconds,
    "matcher": partial(check_choice, choices=("emitter", "mqtt")),
    "max_message_size": partial(check_int, least=1024, most=0xFFFFFFF, unit=" bytes"),
    "allow_collisions": check_flag,
    "connectable": _check_is(ByteStreamConnectable, "an anyio.abc.ByteStreamConnectable"),
    "trace": _check_trace,
    "reconnect": _check_is(Backoff, "a Backoff(), or None for one link only"),
    "while_down": partial(check_choice, choices=("wait", "raise")),
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
