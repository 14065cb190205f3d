"""Opening a connection to one of several servers."""

from __future__ import annotations

import ssl
from typing import Final

import anyio
from anyio import DelimiterNotFound, IncompleteRead

from emitter_anyio._backend.tasks import Tasks
from emitter_anyio._protocol.codec import Codec
from emitter_anyio._protocol.packets import ConnAck, Connect, Event, Publish
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values.channels import format_topic
from emitter_anyio._values.errors import ConnectError, ConnectRefusedError, RemoteProtocolError
from emitter_anyio._values.messages import encode_payload

from .connection import Connection
from .options import Options, Server
from .transport import TRANSPORT_ERRORS, open_transport

FAST_PATH = True
"""Whether connections use the codec's fast path. The nox session plain-engine turns it off."""

_REFUSALS: Final = {
    1: "it does not support MQTT 3.1.1",
    2: "it does not accept the client_id",
    3: "the server is unavailable",
    4: "bad user name or password",
    5: "not authorized",
}
_UNAVAILABLE: Final = 3
"""The only refusal that is temporary."""

_OPENING_ERRORS: Final = (
    EOFError,
    RemoteProtocolError,
    ConnectError,
    # A connectable that uses AnyIO's BufferedByteStream raises these.
    IncompleteRead,
    DelimiterNotFound,
)
"""The exceptions for which an attempt to connect has failed."""

_CLIENT_CERTIFICATE: Final = (
    "; it might require a client certificate, load one with ssl_context.load_cert_chain()"
)
"""A hint, because in TLS 1.3 the client's handshake ends before the server checks a certificate."""


async def open_connection(
    options: Options,
    wants: Wants,
    tasks: Tasks,
    *,
    will_key: str | None = None,
    after: Server | None = None,
) -> Connection:
    """
    Try each server once, in turn, for at most ``connect_timeout`` seconds each.

    :param wants: the subscriptions and presence feeds of the client
    :param tasks: runs the attempts to connect to several addresses of a server
    :param will_key: the key of the will, if there is one
    :param after: the server whose connection was lost; the next one is tried first
    :return: the connection
    :raises ConnectError: if every server failed, with every cause

    Cancelling it closes any socket that it has opened.
    """
    connect = _make_connect(options, will_key)
    causes: dict[str, Exception] = {}
    begin = 0 if after is None else options.servers.index(after) + 1
    for server in (*options.servers[begin:], *options.servers[:begin]):
        if tasks.abandoned():
            # The scope below has caught the task's cancellation.
            break
        try:
            with anyio.move_on_after(options.connect_timeout):
                return await _open(server, options, wants, connect, tasks)
            causes[str(server)] = TimeoutError()
        except (*_OPENING_ERRORS, *TRANSPORT_ERRORS) as exc:
            causes[str(server)] = exc
    raise _connect_error(causes, options, after)


async def _open(
    server: Server, options: Options, wants: Wants, connect: Connect, tasks: Tasks
) -> Connection:
    transport = await open_transport(server, options, tasks)
    try:
        codec = Codec(connect, options.max_message_size, fast_path=FAST_PATH)
        data = codec.connect()
        while data:
            data = data[await transport.send(data) :]
        events: list[Event] = []
        while not events:
            if not (received := await transport.receive()):
                raise EOFError(
                    "the peer closed the connection instead of answering CONNECT"
                    + _CLIENT_CERTIFICATE * server.secure
                )
            events = codec.decode(received)
        match events.pop(0):
            case ConnAck(0):
                return Connection(server, transport, codec, events, options, wants)
            case ConnAck(code):
                reason = _REFUSALS.get(code, f"return code {code}")
                raise ConnectRefusedError(f"the broker refused the connection: {reason}", code=code)
            case RemoteProtocolError() as exc:
                raise exc
        raise AssertionError("no CONNACK")  # pragma: no cover - the codec rejects other packets
    except BaseException:
        await transport.aclose()
        raise


def is_permanent(cause: Exception) -> bool:
    """Return whether connecting to the same server would fail in the same way again."""
    if isinstance(cause, ConnectRefusedError):
        return cause.code != _UNAVAILABLE
    return isinstance(cause, ssl.SSLError)


def _make_connect(options: Options, will_key: str | None) -> Connect:
    will = None
    if options.will is not None and will_key is not None:
        given = options.will
        topic = format_topic(will_key, given.channel)
        will = Publish(
            topic.encode(), encode_payload(given.message, options.json_encoder), None, given.retain
        )
    # MQTT has whole seconds. Emitter ignores the value.
    return Connect(
        options.client_id,
        options.username,
        options.password,
        max(1, round(options.keepalive)),
        will,
    )


def _connect_error(
    causes: dict[str, Exception], options: Options, worked: Server | None
) -> ConnectError:
    reasons = []
    for server, cause in causes.items():
        if isinstance(cause, TimeoutError) and not str(cause):
            reasons.append(f"{server}: no answer within {options.connect_timeout:g} s")
        else:
            reasons.append(f"{server}: {str(cause) or type(cause).__name__}")
    text = "could not connect to " + "; ".join(reasons)
    if options.servers[0].scheme not in ("unix", "connectable") and any(
        isinstance(cause, ConnectionRefusedError) and server != str(worked)
        for server, cause in causes.items()
    ):
        text += (
            " (Emitter's default ports are 8080, and 443 with TLS, instead of MQTT's 1883 and 8883)"
        )
    last = list(causes.values())[-1]
    if isinstance(last, ConnectRefusedError):
        error: ConnectError = ConnectRefusedError(text, causes, code=last.code)
    else:
        error = ConnectError(text, causes)
    error.__cause__ = last
    return error
