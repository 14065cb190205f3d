"""Paho and the original SDK, emitter-io 2.3, which uses Paho: a thread for each connection."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections import deque
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue

import paho.mqtt.client as mqtt

from benchmarks.clients import common
from benchmarks.clients.common import HOST, Figures, Job, Meter
from benchmarks.wire import DONE, KEY, channel, topic


class Paho:
    """Paho with its own thread."""

    def __init__(self, job: Job, keepalive: int, on_message=None) -> None:
        self._client = client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            transport="websockets" if job.websocket else "tcp",
        )
        client.max_inflight_messages_set(max(20, job.in_flight))
        if job.ca is not None:
            client.tls_set_context(job.context)
        connected = threading.Event()
        client.on_connect = lambda *_: connected.set()
        if on_message is not None:
            client.on_message = lambda client, userdata, message: on_message(message.payload)
        client.connect(HOST, job.port, keepalive)
        client.loop_start()
        connected.wait()

    def subscribe(self, name: str) -> None:
        self._client.subscribe(name)

    def publish(self, body: bytes) -> None:
        self._client.publish(topic(0), body)

    def publish_confirmed(self, body: bytes) -> mqtt.MQTTMessageInfo:
        return self._client.publish(topic(0), body, qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class EmitterIo:
    """
    The original SDK. It does not report acknowledgements, so QoS 1 uses the Paho client inside.

    It has at most 20 messages in flight.
    """

    def __init__(self, job: Job, keepalive: int, on_message=None) -> None:
        from emitter import Client

        self._client = client = Client()
        connected = threading.Event()
        client.on_connect = connected.set
        if on_message is not None:
            client.on_message = lambda message: on_message(message.binary)
        # It only trusts the system's authorities, so SSL_CERT_FILE names the peer's authority.
        client.connect(HOST, job.port, secure=job.ca is not None, keepalive=keepalive)
        client.loop_start()
        connected.wait()

    def subscribe(self, name: str) -> None:
        self._client.subscribe(KEY, name)

    def publish(self, body: bytes) -> None:
        self._client.publish(KEY, channel(0), body)

    def publish_confirmed(self, body: bytes) -> mqtt.MQTTMessageInfo:
        return self._client._mqtt.publish(topic(0), body, qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def connection(job: Job, keepalive: int = 60, on_message=None):
    client = (EmitterIo if job.variant == "emitter-io" else Paho)(job, keepalive, on_message)
    try:
        yield client
    finally:
        client.close()


def receive(job: Job) -> Figures:
    done = threading.Event()
    countdown = common.Countdown(job, done.set)
    with connection(job, on_message=countdown.take) as client:
        for number in range(job.subscriptions):
            client.subscribe(channel(number))
        done.wait()
    return countdown.figures()


def publish(job: Job) -> Figures:
    meter, body, done = Meter(), job.body, threading.Event()
    with connection(job, on_message=lambda _: done.set()) as client:
        client.subscribe(DONE)
        time.sleep(0.05)
        meter.start()
        for _ in range(job.messages):
            client.publish(body)
        done.wait()
        meter.stop()
    return meter.figures(job.messages)


def confirmed(job: Job) -> Figures:
    meter, body, waiting = Meter(), job.body, deque()
    with connection(job) as client:
        meter.start()
        for _ in range(job.messages):
            if len(waiting) == job.in_flight:
                waiting.popleft().wait_for_publish()
            waiting.append(client.publish_confirmed(body))
        for info in waiting:
            info.wait_for_publish()
        meter.stop()
    return meter.figures(job.messages)


def round_trip(job: Job) -> Figures:
    body, seconds, back = job.body, [], SimpleQueue()
    with connection(job, on_message=back.put) as client:
        client.subscribe(channel(0))
        for _ in range(job.messages):
            start = time.perf_counter()
            client.publish(body)
            back.get()
            seconds.append(time.perf_counter() - start)
    return common.percentiles(seconds[job.messages // 10 :])


def opening(job: Job) -> Figures:
    seconds, meter = [], Meter()
    meter.start()
    for _ in range(job.messages):
        start = time.perf_counter()
        with connection(job):
            pass
        seconds.append(time.perf_counter() - start)
    meter.stop()
    return common.percentiles(seconds) | {"cpu_us": meter.figures(job.messages)["cpu_us"]}


def idle(job: Job) -> Figures:
    idled = []
    for keepalive in (60, 1):
        with ExitStack() as stack:
            for _ in range(job.connections):
                stack.enter_context(connection(job, keepalive))
            time.sleep(common.SETTLING)
            meter, before = Meter(), common.ask_peer(job.port)["pings"]
            meter.start()
            time.sleep(job.seconds)
            meter.stop()
            pings = common.ask_peer(job.port)["pings"] - before
            idled.append(common.Idling(meter.seconds, meter.processor, pings))
    return common.idle_figures(*idled)


def connections(job: Job) -> Figures:
    with connection(job):
        pass
    before, start = common.memory(), time.perf_counter()
    with ExitStack() as stack:
        clients = [stack.enter_context(connection(job)) for _ in range(job.connections)]
        seconds = time.perf_counter() - start
        time.sleep(common.SETTLING)
        weight = common.memory() - before
        for client in clients:
            client.publish(b"x")
        while common.ask_peer(job.port)["messages"] < job.connections:
            time.sleep(0.05)
    return {"memory_kb": weight / job.connections / 1000, "seconds": seconds}


def stalled(job: Job) -> Figures:
    """Fill a queue from the callback, as is usual with threads, and never read it."""
    busy = common.still_busy()
    with connection(job, on_message=SimpleQueue().put) as client:
        before = common.memory()
        client.subscribe(channel(0))
        while True:
            time.sleep(0.4)
            if not busy():
                return {"growth_mb": (common.peak() - before) / 1e6}


CASES: dict[str, common.Case] = {
    "receive": receive,
    "handler": receive,
    "publish": publish,
    "confirmed": confirmed,
    "round_trip": round_trip,
    "connect": opening,
    "idle": idle,
    "connections": connections,
    "stalled": stalled,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # emitter-io's use of Paho
    common.main(CASES, "emitter" if "emitter-io" in sys.argv[1] else "paho.mqtt.client")
