"""The options of ``connect()``, checked and combined from a mapping or URL and keywords."""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from ipaddress import IPv6Address
from typing import Any, Final, Literal, TypeAlias, TypedDict, cast
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
    check_sync_function,
    check_text,
)
from emitter_anyio._values.errors import MessageTooLargeError
from emitter_anyio._values.messages import JSONEncoder, encode_payload
from emitter_anyio._values.router import Matcher
from emitter_anyio._values.will import Will

DEFAULT_HOST: Final = "api.emitter.io"
PORTS: Final = {"mqtt": 8080, "mqtts": 443, "ws": 8080, "wss": 443}
"""Emitter's default ports, which differ from MQTT's 1883 and 8883."""

_SAFE_IN_PATH: Final = "/%:@!$&'()*+,;=~"
"""The characters besides letters and digits that a path may contain unquoted (RFC 3986)."""

_INVALID_IN_HOST: Final = re.compile(r"[\x00-,/:-@\[-^`{-\x7f\s]")
"""Characters that host names cannot contain. International names may contain non-ASCII ones."""

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"(?! )[ -~]*(?<! )")
"""Printable ASCII without a space at either end."""

_HANDSHAKE_HEADERS: Final = re.compile(
    r"host|connection|upgrade|sec-websocket-.*|content-length|transfer-encoding", re.IGNORECASE
)
"""Headers that the client sends, or that would change how the server parses the request."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")

_MISPLACED_AT: Final = re.compile(r"://.*[/?#\[\]].*@", re.DOTALL)
"""An ``@`` after the end of the user name and password, which suggests an unquoted character."""

_MAX_FIELD_BYTES: Final = 65535
"""The maximum size of a string or will payload in MQTT, which has 16-bit lengths."""

MAX_KEEPALIVE: Final = 60
"""
The maximum keepalive period in seconds. Emitter drops a connection on which it receives nothing for
120 s, regardless of the period in CONNECT (its ``conn.go``).
"""


_BACKOFF: Final = Backoff()


@dataclass(frozen=True, slots=True)
class Server:
    """
    The address of a broker.

    :ivar scheme: ``"mqtt"``, ``"mqtts"``, ``"ws"``, ``"wss"`` or ``"unix"``; ``"connectable"`` if a
        connectable opens the connection
    :ivar host: a host name, an IP address, or the path of a Unix socket
    :ivar port: the port; 0 for a Unix socket or connectable
    :ivar path: the quoted path and query for WebSocket, else an empty string. The ``str`` and the
        ``repr`` do not show the query, because it might contain a token
    """

    scheme: str
    host: str
    port: int
    path: str = field(default="", repr=False)

    @property
    def secure(self) -> bool:
        """Whether the connection uses TLS."""
        return self.scheme in ("mqtts", "wss")

    @property
    def websocket(self) -> bool:
        """Whether the connection uses WebSocket."""
        return self.scheme in ("ws", "wss")

    @property
    def shown_path(self) -> str:
        """The path for WebSocket, without the query."""
        return self.path.partition("?")[0]

    def __str__(self) -> str:
        if self.scheme == "connectable":
            return "the connectable"
        if self.scheme == "unix":
            return f"unix://{self.host}"
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        path = "" if self.shown_path == "/" else self.shown_path
        return f"{self.scheme}://{host}:{self.port}{path}"


TraceHook: TypeAlias = Callable[[str, Mapping[str, object]], object]
"""A function that receives the name of an event and its details."""


class ConnectOptions(TypedDict, total=False):
    """
    The types of the keywords of :func:`connect`, which describes them.

    Use it to annotate options that your own code passes on, as in ``**options:
    Unpack[ConnectOptions]``.
    """

    host: str
    port: int
    secure: bool
    servers: Sequence[str] | None
    keepalive: float
    username: str | None
    password: str | None
    client_id: str
    will: Will | None
    headers: Mapping[str, str] | None
    ssl_context: ssl.SSLContext | None
    connect_timeout: float | None
    request_timeout: float | None
    disconnect_timeout: float
    reconnect: Backoff | Literal[False] | None
    retry_first_connect: bool
    while_down: Literal["wait", "raise"]
    matcher: Matcher
    max_message_size: int
    allow_collisions: bool
    connectable: ByteStreamConnectable | None
    trace: TraceHook | None
    json_encoder: JSONEncoder | None


@dataclass(frozen=True, slots=True, repr=False)
class Options:
    """The options of a client; see :func:`~emitter_anyio.connect`."""

    servers: tuple[Server, ...]
    keepalive: float = 30
    username: str | None = None
    password: str | None = None
    client_id: str = ""
    will: Will | None = None
    headers: tuple[tuple[str, str], ...] = ()
    ssl_context: ssl.SSLContext | None = None
    connect_timeout: float | None = 10
    request_timeout: float | None = 10
    disconnect_timeout: float = 5
    matcher: Matcher = "emitter"
    max_message_size: int = 65536
    allow_collisions: bool = False
    connectable: ByteStreamConnectable | None = None
    reconnect: Backoff | None = _BACKOFF
    retry_first_connect: bool = False
    while_down: Literal["wait", "raise"] = "wait"
    trace: TraceHook | None = None
    json_encoder: JSONEncoder | None = None


logger = logging.getLogger("emitter_anyio")

_Check: TypeAlias = Callable[[str, object], Any]
"""Checks the value of an option: takes its name and value, and returns the plain value."""


def make_options(
    options: Mapping[str, object] | str | None, keywords: Mapping[str, object]
) -> Options:
    """
    Check and combine the arguments of ``connect()``.

    :param options: a mapping of options, or a URL
    :param keywords: further options
    :raises TypeError: if an option is unknown, has the wrong type, or has conflicting values
    :raises ValueError: if a value is invalid or out of range
    :raises MessageTooLargeError: if the CONNECT packet would be too large
    :raises ImportError: if WebSocket is used and wsproto is not installed
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
            f"connect() requires a URL or a mapping of options, not {type(options).__name__}"
        )
    given: dict[str, Any] = {}
    for name, value in (*first.items(), *keywords.items()):
        check = _OTHER_CHECKS.get(name) or _ADDRESS_CHECKS.get(name)
        if check is None:
            known = ", ".join(sorted((*_ADDRESS_CHECKS, *_OTHER_CHECKS)))
            raise TypeError(f"unknown option {name!r}; known options are {known}")
        checked = check(name, value)
        if name in given and given[name] != checked:
            raise TypeError(
                f"conflicting values for {name!r} in {origin} and the keywords; give only one"
            )
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
    Return the servers to connect to.

    :param address: the options of the address, without ``connectable``
    :param url_server: the server in the URL, if there is one
    :param secure: the default of the option ``secure``
    """
    servers: tuple[Server, ...] | None = address.pop("servers", None)
    if servers is not None:
        if address:
            raise TypeError(f"cannot combine servers with {', '.join(address)}; use only servers")
        return servers
    scheme = "mqtts" if address.get("secure", secure) else "mqtt"
    host = address.get("host", DEFAULT_HOST)
    if host.startswith("/"):
        return (Server("unix", host, 0),)
    server = Server(scheme, host, address.get("port", PORTS[scheme]))
    # The options agree with the URL, but only the URL can state WebSocket and a path.
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
        raise ValueError(
            f"invalid {name}: the path of a Unix socket contains NUL or an unencodable character"
        )
    return host


def _check_host(name: str, host: str) -> str:
    # No message contains the host, because it might be a URL with a password.
    if not host:
        raise ValueError(f"{name} must not be empty")
    if "://" in host:
        why = "it is a URL; pass it as the first argument of connect(), or use only its host"
    elif "@" in host:
        why = "it contains '@'; use username= and password= for credentials"
    elif host.startswith("["):
        why = "it contains brackets; use an IPv6 address such as '::1', and port= for the port"
    elif ":" not in host:
        if not (bad := _INVALID_IN_HOST.search(host)):
            return _check_utf8(name, host)
        why = f"it contains {bad[0]!r}, which host names cannot; use only the name or address"
    elif (address := host.partition("%"))[0].count(":") == 1:
        why = "it contains a port; use port= for the port"
    else:
        try:
            IPv6Address(host)
        except ValueError:
            why = "it contains ':' but is not an IPv6 address"
        else:
            if not _INVALID_IN_HOST.search(address[2]):
                return _check_utf8(name, host)
            why = "its zone must be the name or number of a network interface"
    raise ValueError(f"invalid {name}: {why}")


def _check_servers(name: str, urls: object) -> tuple[Server, ...] | None:
    if urls is None:
        return None
    if isinstance(urls, str) or not isinstance(urls, Sequence):
        raise TypeError(f"servers must be a sequence of URLs, not {type(urls).__name__}")
    servers = []
    for url in urls:
        server, credentials = _parse_url("URL in servers", url)
        if credentials:
            raise TypeError(
                "a URL in servers must not contain a user name or password; "
                "use username= and password="
            )
        servers.append(server)
    if not servers:
        raise ValueError("servers must not be empty")
    if len({server.scheme for server in servers}) > 1:
        raise ValueError("all URLs in servers must have the same scheme")
    return tuple(servers)


def _parse_url(name: str, value: object) -> tuple[Server, dict[str, Any]]:
    # No message contains the URL, because it might contain a password.
    url = check_text(f"a {name}", value)
    try:
        return _split_url(url)
    except ValueError as exc:
        hint = ""
        if _MISPLACED_AT.search(url):
            hint = (
                "; if the user name or password contains one of / ? # [ ], quote it with "
                "urllib.parse.quote(text, safe='')"
            )
        raise ValueError(f"{exc}{hint}") from None


def _split_url(url: str) -> tuple[Server, dict[str, Any]]:
    # urlsplit() would silently remove some of them.
    if _CONTROL.search(url):
        raise ValueError("invalid URL: it contains a control character, such as a line break")
    _check_utf8("URL", url)
    try:
        parts = urlsplit(url)
    except ValueError:
        # The message of urlsplit() might contain the password.
        raise ValueError("invalid URL: the host part is malformed") from None
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
            raise ValueError("invalid URL: that of a Unix socket is unix:///path/to/socket")
        return Server("unix", _check_host_or_path("path", _unquote("path", parts.path)), 0), {}
    if parts.scheme not in PORTS:
        raise ValueError(
            f"invalid URL: unknown scheme {parts.scheme!r}; use mqtt, mqtts, ws, wss or unix, "
            "as in mqtt://127.0.0.1:8080"
        )
    websocket = parts.scheme in ("ws", "wss")
    if not websocket and (parts.path not in ("", "/") or parts.query or parts.fragment):
        raise ValueError(
            "invalid URL: it must end after host and port; pass channels and keys to the methods"
        )
    if parts.fragment:
        raise ValueError("invalid URL: it must end before '#'; quote a '#' as %23")
    if "@" in parts.query:
        # It is more often part of a password with an unquoted "?".
        raise ValueError("invalid URL: its query contains '@'; quote it as %40")
    host = parts.hostname
    if not host:
        raise ValueError("invalid URL: it has no host")
    # In a URL, a quoted percent sign precedes the zone of an address (RFC 6874).
    host = _check_host("host in the URL", host.replace("%25", "%", 1) if ":" in host else host)
    try:
        port = parts.port
    except ValueError:
        raise ValueError("invalid URL: the port must be from 1 to 65535") from None
    credentials = {}
    if parts.username is not None:
        credentials["username"] = _unquote("user name", parts.username)
    if parts.password is not None:
        credentials["password"] = _unquote("password", parts.password)
    port = _check_port("port", PORTS[parts.scheme] if port is None else port)
    path = quote(parts.path or "/", safe=_SAFE_IN_PATH) if websocket else ""
    if parts.query:
        path += "?" + quote(parts.query, safe=_SAFE_IN_PATH + "?")
    return Server(parts.scheme, host, port, path), credentials


def _unquote(what: str, text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(
            f"invalid URL: the percent-encoding of the {what} is not UTF-8; quote it with "
            "urllib.parse.quote(text, safe='')"
        ) from None


def _address_options(server: Server) -> dict[str, Any]:
    if server.scheme == "unix":
        return {"host": server.host}
    return {"host": server.host, "port": server.port, "secure": server.secure}


def _check_together(options: Options) -> None:
    if options.password is not None and options.username is None:
        raise TypeError("password requires username: MQTT 3.1.1 does not allow a password alone")
    if options.retry_first_connect and options.reconnect is None:
        raise TypeError("retry_first_connect requires reconnect, a Backoff for the delays")
    if options.headers and not options.servers[0].websocket:
        raise TypeError("headers requires WebSocket; use a ws:// or wss:// URL")
    if options.ssl_context is not None:
        if not options.servers[0].secure:
            raise TypeError("ssl_context requires TLS; use secure=True, mqtts:// or wss://")
        _check_trust(options.ssl_context)
    check_connect_size(options)
    if options.servers[0].websocket:
        _check_websocket()


def check_connect_size(options: Options, will_key: str | None = None) -> None:
    """
    Check the size of the CONNECT packet.

    :param will_key: the key of the will, if a function has returned it
    :raises MessageTooLargeError: if the packet, or the message of the will, is too large
    :raises ValueError: if the message of the will cannot be encoded
    :raises TypeError: if the message of the will cannot be encoded
    """
    fields = [
        text.encode()
        for text in (options.client_id, options.username, options.password)
        if text is not None
    ]
    if (will := options.will) is not None:
        payload = encode_payload(will.message, options.json_encoder)
        if len(payload) > _MAX_FIELD_BYTES:
            raise MessageTooLargeError(
                f"cannot use the will: its message has {len(payload)} bytes, but MQTT allows at "
                f"most {_MAX_FIELD_BYTES}"
            )
        key = will_key or (will.key if isinstance(will.key, str) else PLACEHOLDER_KEY)
        fields += [format_topic(key, will.channel).encode(), payload]
    # Protocol, version, flags and keepalive take 10 bytes. Each field has a length of 2 bytes.
    size = 10 + 2 * len(fields) + sum(map(len, fields))
    if size > options.max_message_size:
        raise MessageTooLargeError(
            f"cannot connect: client_id, username, password and will require a CONNECT packet of "
            f"{size} bytes, which exceeds max_message_size ({options.max_message_size})"
        )


_check_port = partial(check_int, least=1, most=65535)


def _check_timeout(name: str, value: object) -> float | None:
    return None if value is None else check_seconds(name, value)


def _check_utf8(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as exc:
        raise ValueError(f"{name} cannot be encoded as UTF-8: {exc.reason}") from None
    if size > _MAX_FIELD_BYTES:
        raise ValueError(f"{name} must be at most {_MAX_FIELD_BYTES} bytes, not {size}")
    return text


def _check_string(name: str, value: object) -> str:
    text = _check_utf8(name, check_text(name, value))
    if "\0" in text:
        raise ValueError(f"{name} must not contain a NUL character: MQTT does not allow it")
    return text


def _check_username(name: str, value: object) -> str | None:
    return None if value is None else _check_string(name, value)


def _check_password(name: str, value: object) -> str | None:
    return None if value is None else _check_utf8(name, check_text(name, value))


def _check_is(kind: type, what: str) -> _Check:
    def check(name: str, value: object) -> object:
        if not isinstance(value, kind) and value is not None:
            raise TypeError(f"{name} must be {what}, not {type(value).__name__}")
        return value

    return check


_ADDRESS_CHECKS: Final[Mapping[str, _Check]] = {
    "host": _check_host_or_path,
    "port": _check_port,
    "secure": check_flag,
    "servers": _check_servers,
}


def _check_headers(name: str, value: object) -> tuple[tuple[str, str], ...]:
    # No message contains a header, because it might be a secret.
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of str, not {type(value).__name__}")
    headers: dict[str, tuple[str, str]] = {}
    for header, content in value.items():
        header = check_text(f"a name in {name}", header)
        content = check_text(f"a value in {name}", content)
        if not _HEADER_NAME.fullmatch(header):
            raise ValueError(
                f"{name} contains an invalid name; use letters, digits and !#$%&'*+-.^_`|~"
            )
        if not _HEADER_VALUE.fullmatch(content):
            raise ValueError(
                f"{name} contains an invalid value; use printable ASCII characters without a line "
                "break, and without a space at the start or the end"
            )
        if _HANDSHAKE_HEADERS.fullmatch(header):
            raise ValueError(f"{name} must not contain {header!r}, which the handshake determines")
        if header.lower() in headers:
            raise ValueError(f"{name} contains {header!r} twice, in different case")
        headers[header.lower()] = header, content
    return tuple(headers.values())


def _check_reconnect(name: str, value: object) -> Backoff | None:
    if value is None or value is False:
        return None
    if not isinstance(value, Backoff):
        raise TypeError(
            f"{name} must be a Backoff, or None or False for one connection only, not "
            f"{type(value).__name__}"
        )
    return value


def _check_trace(name: str, value: object) -> TraceHook | None:
    if value is None:
        return None
    return check_function(name, cast("TraceHook", value))


def _check_json_encoder(name: str, value: object) -> JSONEncoder | None:
    if value is None:
        return None
    return check_sync_function(name, cast("JSONEncoder", value))


_OTHER_CHECKS: Final[Mapping[str, _Check]] = {
    "keepalive": partial(check_seconds, least=1, most=MAX_KEEPALIVE),
    "username": _check_username,
    "password": _check_password,
    "client_id": _check_string,
    "will": _check_is(Will, "a Will or None"),
    "headers": _check_headers,
    "ssl_context": _check_is(ssl.SSLContext, "an ssl.SSLContext or None"),
    "connect_timeout": _check_timeout,
    "request_timeout": _check_timeout,
    "disconnect_timeout": check_seconds,
    "matcher": partial(check_choice, choices=("emitter", "mqtt")),
    "max_message_size": partial(check_int, least=1024, most=0xFFFFFFF, unit=" bytes"),
    "allow_collisions": check_flag,
    "connectable": _check_is(ByteStreamConnectable, "an anyio.abc.ByteStreamConnectable or None"),
    "trace": _check_trace,
    "json_encoder": _check_json_encoder,
    "reconnect": _check_reconnect,
    "retry_first_connect": check_flag,
    "while_down": partial(check_choice, choices=("wait", "raise")),
}


def _check_trust(context: ssl.SSLContext) -> None:
    if context.protocol is ssl.PROTOCOL_TLS_SERVER:
        raise ValueError(
            "ssl_context must be a client context, not a server context; "
            "create one with ssl.create_default_context()"
        )
    if context.verify_mode is ssl.CERT_NONE:
        logger.warning(
            "the broker's identity is not verified: ssl_context accepts any certificate "
            "(verify_mode=CERT_NONE)"
        )
    elif not context.check_hostname:
        logger.warning(
            "the broker's identity is not verified: ssl_context accepts certificates for any host "
            "name (check_hostname=False)"
        )


def _check_websocket() -> None:
    # Import it here rather than when connecting, because importing blocks the event loop.
    try:
        import_module("wsproto")
    except ImportError as exc:
        raise ImportError(
            "ws:// and wss:// require wsproto; run pip install '.[websocket]' in a checkout",
            name="wsproto",
        ) from exc
