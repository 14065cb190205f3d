"""Opening a connection: each server in turn, and why none could be reached."""

from __future__ import annotations

import ssl
from typing import Final

import anyio

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
"""Whether connections use the codec's fast path. The test session plain-engine turns it off."""

_REFUSALS: Final = {
    1: "it does not speak MQTT 3.1.1",
    2: "it does not take the client_id",
    3: "the server is unavailable",
    4: "bad user name or password",
    5: "not authorized",
}
_UNAVAILABLE: Final = 3
"""The only refusal that passes by itself."""

_CLIENT_CERTIFICATE: Final = (
    "; it might require a client certificate, which ssl_context.load_cert_chain() loads"
)
"""TLS 1.3 ends the client's handshake before the server looks for the client's certificate."""


async def open_connection(
    options: Options, wants: Wants, *, will_key: str | None = None, after: Server | None = None
) -> Connection:
    """
    Try each server once, in turn, each under ``connect_timeout``.

    Cancelling it at any point leaves nothing behind.

    :param wants: what the client wants from every connection
    :param will_key: the key of the will, if there is one
    :param after: begin behind this server, which has just failed
    :raises ConnectError: if none can be reached, with every cause
    """
    connect = _make_connect(options, will_key)
    causes: dict[str, Exception] = {}
    begin = 0 if after is None else options.servers.index(after) + 1
    for server in (*options.servers[begin:], *options.servers[:begin]):
        try:
            with anyio.move_on_after(options.connect_timeout):
                return await _open(server, options, wants, connect)
            causes[str(server)] = TimeoutError()
        except (*TRANSPORT_ERRORS, EOFError, RemoteProtocolError, ConnectError) as exc:
            causes[str(server)] = exc
    raise _connect_error(causes, options, after)


async def _open(server: Server, options: Options, wants: Wants, connect: Connect) -> Connection:
    transport = await open_transport(server, options)
    try:
        codec = Codec(connect, options.max_message_size, fast_path=FAST_PATH)
        data = codec.connect()
        while data:
            data = data[await transport.send(data) :]
        events: list[Event] = []
        while not events:
            if not (data := await transport.receive()):
                raise EOFError(
                    "the peer closed the connection instead of answering CONNECT"
                    + _CLIENT_CERTIFICATE * server.secure
                )
            events = codec.decode(data)
        match events.pop(0):
            case ConnAck(0):
                return Connection(server, transport, codec, events, options, wants)
            case ConnAck(code):
                raise ConnectRefusedError(
                    f"{server} refused: {_REFUSALS.get(code, f'code {code}')}", code=code
                )
            case RemoteProtocolError() as exc:
                raise exc
        raise AssertionError("the codec begins with CONNACK")  # pragma: no cover - its promise
    except BaseException:
        await transport.aclose()
        raise


def is_permanent(cause: Exception) -> bool:
    """Tell whether a server that could not be reached will fail in the same way again."""
    if isinstance(cause, ConnectRefusedError):
        return cause.code != _UNAVAILABLE
    return isinstance(cause, ssl.SSLError)


def _make_connect(options: Options, will_key: str | None) -> Connect:
    will = None
    if options.will is not None and will_key is not None:
        given = options.will
        topic = format_topic(will_key, given.channel)
        will = Publish(topic.encode(), encode_payload(given.message), None, given.retain)
    # MQTT counts in whole seconds; Emitter passes over what it is told here.
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
    words = []
    for server, cause in causes.items():
        if isinstance(cause, ConnectRefusedError):
            words.append(str(cause))
        elif isinstance(cause, TimeoutError) and not str(cause):
            words.append(f"{server}: no answer within {options.connect_timeout:g} s")
        else:
            words.append(f"{server}: {str(cause) or type(cause).__name__}")
    text = "could not connect to " + "; ".join(words)
    if options.servers[0].scheme != "unix" and any(
        isinstance(cause, ConnectionRefusedError) and server != str(worked)
        for server, cause in causes.items()
    ):
        text += (
            " (Emitter listens on 8080, and on 443 with TLS, unless it is told otherwise, not on "
            "MQTT's 1883 and 8883)"
        )
    last = list(causes.values())[-1]
    if isinstance(last, ConnectRefusedError):
        error: ConnectError = ConnectRefusedError(text, causes, code=last.code)
    else:
        error = ConnectError(text, causes)
    error.__cause__ = last
    return error
