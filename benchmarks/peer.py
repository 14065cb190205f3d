"""
The peer of every measured client: a process that sends, counts or echoes messages.

It behaves like Emitter: topics of SUBSCRIBE and inbound PUBLISH begin with a key, and topics of
delivered messages are channels. To use little time during a measurement, it sends chunks of packets
that were encoded before, and counts packets of equal length by their bytes.

Its argument is a :class:`Part` as JSON. It prints its port, serves one connection after another (in
mode ``"many"`` all of them concurrently), and prints its counters as JSON when its standard input
is closed.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import ssl
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Final, Literal

from benchmarks import wire

_CHUNK_BYTES: Final = 64 * 1024
_READ_BYTES: Final = 256 * 1024
_DRIP_SECONDS: Final = 0.001
"""The pause after each message of a drip, in seconds."""


@dataclass(frozen=True)
class Part:
    """
    The parameters of the peer.

    :ivar mode: ``"blast"`` sends ``messages`` after ``subscriptions`` filters were subscribed to;
        ``"drip"`` sends them one at a time, with a pause after each;
        ``"sink"`` counts ``messages`` and then publishes to the topic ``DONE``; ``"echo"`` sends
        back each message; ``"many"`` serves many connections concurrently, and sends its counters
        as the reply to ``STAT``
    :ivar topics: the number of channels that a blast uses in turn
    :ivar certificate: the files of the certificate and its key, for TLS
    """

    mode: Literal["blast", "drip", "sink", "echo", "many"]
    messages: int = 0
    payload: int = 64
    subscriptions: int = 1
    topics: int = 1
    certificate: tuple[str, str] | None = None
    websocket: bool = False


@dataclass
class Counted:
    """The counters of the peer. ``seconds`` is the time from the first to the last message."""

    connections: int = 0
    messages: int = 0
    pings: int = 0
    seconds: float = 0.0


@dataclass
class Peer:
    part: Part
    counted: Counted = field(default_factory=Counted)
    filters: int = 0
    started: float = 0.0
    free: threading.Event = field(default_factory=threading.Event)
    """Set while no connection is served."""

    def serve(self, listener: socket.socket) -> None:
        """Serve one connection after another."""
        context = None
        if self.part.certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*self.part.certificate)
        blob = {"blast": self._blob, "drip": self._drops}.get(self.part.mode, list)()
        while True:
            self.free.set()
            sock, _ = listener.accept()
            self.free.clear()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.filters, self.started = 0, 0.0
            try:
                if context is not None:
                    sock = context.wrap_socket(sock, server_side=True)
                self._converse(wire.WebSocketPipe(sock) if self.part.websocket else sock, blob)
            except OSError:
                pass  # A client that has finished can close its connection in any way.
            finally:
                sock.close()

    def _converse(self, pipe: wire.Pipe, blob: list[bytes]) -> None:
        buffer = b""
        while received := pipe.recv(_READ_BYTES):
            buffer += received
            position = 0
            while (found := wire.framed(buffer, position)) is not None:
                start, end = found
                kind = buffer[position] >> 4
                if kind == wire.PUBLISH and self.part.mode == "sink":
                    self._count(pipe, buffer[position:], end - position, start - position)
                    end = len(buffer)
                elif kind == wire.PUBLISH and self.part.mode == "echo":
                    pipe.sendall(_echo(buffer[start:end]))
                elif kind == wire.DISCONNECT:
                    if self.started:
                        self.counted.seconds = time.perf_counter() - self.started
                    return
                else:
                    pipe.sendall(self.reply(kind, buffer[start:end]))
                position = end
                if blob and self.filters >= self.part.subscriptions:
                    self.filters = 0
                    self.started = time.perf_counter()
                    for chunk in blob:
                        pipe.sendall(chunk)
                        if self.part.mode == "drip":
                            time.sleep(_DRIP_SECONDS)
            buffer = buffer[position:]

    def reply(self, kind: int, body: bytes) -> bytes:
        """Return the reply to a packet."""
        if kind == wire.CONNECT:
            if body[6] != 4:
                raise SystemExit(f"unsupported protocol level {body[6]}: expected 4 (MQTT 3.1.1)")
            self.counted.connections += 1
            return wire.CONNACK
        if kind == wire.PINGREQ:
            self.counted.pings += 1
            return wire.PINGRESP
        if kind == wire.SUBSCRIBE:
            position, filters = 2, 0
            while position < len(body):
                position += 3 + int.from_bytes(body[position : position + 2], "big")
                filters += 1
            self.filters += filters
            return b"\x90" + wire.remaining_length(2 + filters) + body[:2] + bytes(filters)
        if kind == wire.UNSUBSCRIBE:
            return b"\xb0\x02" + body[:2]
        if kind == wire.PUBLISH:
            self.counted.messages += 1
        return b""

    def _blob(self) -> list[bytes]:
        """Return the encoded messages of a blast, in chunks of whole packets."""
        payload = b"x" * self.part.payload
        turns = [wire.publish(wire.channel(number), payload) for number in range(self.part.topics)]
        packets = cycle(turns)
        by_chunk = max(1, _CHUNK_BYTES // len(turns[0]))
        left, blob = self.part.messages, list[bytes]()
        same = b"".join(islice(packets, by_chunk)) if len(turns) == 1 else None
        while left > 0:
            number = min(by_chunk, left)
            if same is not None and number == by_chunk:
                blob.append(same)
            else:
                blob.append(b"".join(islice(packets, number)))
            left -= number
        return blob

    def _drops(self) -> list[bytes]:
        """Return the encoded messages of a drip."""
        return [wire.publish(wire.channel(0), b"x" * self.part.payload)] * self.part.messages

    def _count(self, pipe: wire.Pipe, data: bytes, size: int, body: int) -> None:
        """
        Count publishes of equal length, and acknowledge those of QoS 1.

        :param data: the bytes received so far
        :param size: the length of each packet in bytes
        :param body: the offset of the body in each packet
        """
        start = time.perf_counter()
        confirmed = bool(data[0] & 6)
        at = body + 2 + int.from_bytes(data[body : body + 2], "big")
        left = self.part.messages * size
        if not confirmed:
            left -= len(data)
            bucket = bytearray(_READ_BYTES)
            while left > 0:
                received = pipe.recv_into(bucket)
                if not received:
                    return
                left -= received
        else:
            rest = b""
            while True:
                data = rest + data
                whole = len(data) // size
                if whole:
                    cut = whole * size
                    acks = bytearray(4 * whole)
                    acks[0::4], acks[1::4] = b"\x40" * whole, b"\x02" * whole
                    acks[2::4], acks[3::4] = data[at:cut:size], data[at + 1 : cut : size]
                    pipe.sendall(bytes(acks))
                    left -= cut
                    data = data[cut:]
                if left <= 0:
                    break
                rest = data
                data = pipe.recv(_READ_BYTES)
                if not data:
                    return
        self.counted.messages += self.part.messages
        self.counted.seconds = time.perf_counter() - start
        pipe.sendall(wire.publish(wire.DONE, b"done"))


def _echo(body: bytes) -> bytes:
    length = int.from_bytes(body[:2], "big")
    name = body[2 : 2 + length].decode()
    return wire.publish(name.removeprefix(wire.KEY + "/"), body[2 + length :])


class Connections:
    """Serves many connections with little traffic concurrently."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._selector = selectors.DefaultSelector()
        self._buffers: dict[socket.socket, bytes] = {}

    def serve(self, listener: socket.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is listener:
                    sock, _ = listener.accept()
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._buffers[sock] = b""
                    self._selector.register(sock, selectors.EVENT_READ)
                else:
                    self._read(key.fileobj)

    def _read(self, sock: socket.socket) -> None:
        try:
            received = sock.recv(_CHUNK_BYTES)
            if received == b"STAT":
                sock.sendall(json.dumps(asdict(self._peer.counted)).encode())
                received = b""
            if received and self._reply_all(sock, self._buffers[sock] + received):
                return
        except OSError:
            pass
        self._selector.unregister(sock)
        del self._buffers[sock]
        sock.close()

    def _reply_all(self, sock: socket.socket, buffer: bytes) -> bool:
        position = 0
        while (found := wire.framed(buffer, position)) is not None:
            kind = buffer[position] >> 4
            if kind == wire.DISCONNECT:
                return False
            sock.sendall(self._peer.reply(kind, buffer[found[0] : found[1]]))
            position = found[1]
        self._buffers[sock] = buffer[position:]
        return True


def main() -> None:
    given = json.loads(sys.argv[1])
    if given.get("certificate"):
        given["certificate"] = tuple(given["certificate"])
    part = Part(**given)
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    peer = Peer(part)
    serve = Connections(peer).serve if part.mode == "many" else peer.serve
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
    if part.mode != "many":
        peer.free.wait(5)  # The last packets of a client might not have been read yet.
    print(json.dumps(asdict(peer.counted)), flush=True)
    os._exit(0)  # Do not wait for the thread that serves.


if __name__ == "__main__":
    main()
