"""Paho on asyncio with an external loop, like its example ``loop_asyncio.py``."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import paho.mqtt.client as mqtt

from benchmarks.clients import aio, common
from benchmarks.clients.common import HOST, Figures, Job, Meter
from benchmarks.wire import DONE, channel, topic


class Loop:
    """Calls Paho when its socket is ready, and once a second for its keepalive."""

    def __init__(self, client: mqtt.Client) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        client.on_socket_open = self._open
        client.on_socket_close = self._close
        client.on_socket_register_write = self._register
        client.on_socket_unregister_write = self._unregister

    def _open(self, client, userdata, sock) -> None:
        self._loop.add_reader(sock, self._read, sock)
        self._misc = self._loop.create_task(self._tend())

    def _read(self, sock) -> None:
        self._client.loop_read()
        # Bytes that TLS has already read do not make the socket readable.
        while isinstance(sock, ssl.SSLSocket) and sock.pending():
            self._client.loop_read()

    def _close(self, client, userdata, sock) -> None:
        self._loop.remove_reader(sock)
        self._misc.cancel()

    def _register(self, client, userdata, sock) -> None:
        self._loop.add_writer(sock, client.loop_write)

    def _unregister(self, client, userdata, sock) -> None:
        self._loop.remove_writer(sock)

    async def _tend(self) -> None:
        while self._client.loop_misc() == mqtt.MQTT_ERR_SUCCESS:
            await asyncio.sleep(1)


@asynccontextmanager
async def connection(
    job: Job, keepalive: int = 60, on_message=None, on_publish=None
) -> AsyncIterator[mqtt.Client]:
    client = mqtt.Client(
        mqtt.CallbackAPIVersion.VERSION2,
        transport="websockets" if job.websocket else "tcp",
    )
    client.max_inflight_messages_set(max(20, job.in_flight))
    if job.ca is not None:
        client.tls_set_context(job.context)
    connected, gone = aio.Bell(), aio.Bell()
    client.on_connect = lambda *_: connected.ring()
    client.on_disconnect = lambda *_: gone.ring()
    if on_message is not None:
        client.on_message = on_message
    if on_publish is not None:
        client.on_publish = on_publish
    Loop(client)
    client.connect(HOST, job.port, keepalive)
    await connected.wait()
    try:
        yield client
    finally:
        client.disconnect()
        await gone.wait()


async def receive(job: Job) -> Figures:
    done = asyncio.Event()
    countdown = common.Countdown(job, done.set)
    take = countdown.take

    def on_message(client, userdata, message):
        take(message.payload)

    async with connection(job, on_message=on_message) as client:
        client.subscribe([(name, 0) for name in aio.channels(job)])
        await done.wait()
    return countdown.figures()


async def publish(job: Job) -> Figures:
    meter, body, name, bell = Meter(), job.body, topic(0), aio.Bell()
    async with connection(job, on_message=lambda *_: bell.ring()) as client:
        client.subscribe(DONE)
        await asyncio.sleep(0.05)
        meter.start()
        for number in range(job.messages):
            client.publish(name, body)
            if not number & 63:
                await asyncio.sleep(0)
        await bell.wait()
        meter.stop()
    return meter.figures(job.messages)


async def confirmed(job: Job) -> Figures:
    meter, body, name = Meter(), job.body, topic(0)
    room, left, done = asyncio.Semaphore(job.in_flight), job.messages, asyncio.Event()

    def on_publish(*_):
        nonlocal left
        left -= 1
        room.release()
        if not left:
            done.set()

    async with connection(job, on_publish=on_publish) as client:
        meter.start()
        for _ in range(job.messages):
            await room.acquire()
            client.publish(name, body, qos=1)
        await done.wait()
        meter.stop()
    return meter.figures(job.messages)


async def round_trip(job: Job) -> Figures:
    body, name, bell = job.body, topic(0), aio.Bell()
    async with connection(job, on_message=lambda *_: bell.ring()) as client:
        client.subscribe(channel(0))
        return await aio.trips(job, lambda: client.publish(name, body), bell.wait, awaited=False)


async def stalled(job: Job) -> Figures:
    queue = asyncio.Queue()
    async with connection(job, on_message=lambda *got: queue.put_nowait(got[2])) as client:
        before = common.memory()
        client.subscribe(channel(0))
        return await aio.stall(before)


CASES = {
    "receive": receive,
    "handler": receive,
    "publish": publish,
    "confirmed": confirmed,
    "round_trip": round_trip,
    "stalled": stalled,
    **aio.shared(connection, lambda client, name, body: client.publish(name, body) and None),
}

if __name__ == "__main__":
    common.main({name: aio.run(case) for name, case in CASES.items()}, "paho.mqtt.client")
