"""
A service in a Trio nursery: the client, a request handler and a publisher run as tasks.

Run it with a development broker:  python examples/trio_service.py
It prints commands for a second terminal: ``emitter-anyio sub clock/tick/`` shows its ticks, and
``emitter-anyio request clock/ask/ ''`` prints the time, as a program can with
``emitter.request(key, "clock/ask/", "")`` and a key for clock/#/. To use your own broker, set
EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. To stop the service, press Ctrl-C or send
SIGTERM, as systemd and Docker do: it sends its queued messages, disconnects and exits with 0.
"""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime
from functools import partial

import trio

from emitter_anyio import ChannelKey, Emitter, EmitterMessage, connect
from emitter_anyio.testing import ConfiguredBroker


def tell_time(request: EmitterMessage) -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


async def tick(emitter: Emitter, key: ChannelKey) -> None:
    while True:
        # Stored for two seconds, so that a new subscriber receives the latest tick immediately.
        await emitter.publish(key, "clock/tick/", datetime.now(UTC).timestamp(), ttl=2)
        await trio.sleep(1)


async def main() -> None:
    async with ConfiguredBroker() as broker:
        emitter = connect(broker.url, username="clock")
        # The client reconnects automatically. If it gives up, or a task fails, the nursery cancels
        # the other tasks and the program ends with that exception.
        async with trio.open_nursery() as nursery:
            await nursery.start(emitter.run)
            key = await emitter.keygen(broker.secret_key, "clock/#/", "rws")
            await nursery.start(partial(emitter.serve, key, "clock/ask/", tell_time))
            nursery.start_soon(tick, emitter, key)

            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                print("clock service started; to see its ticks or request the time, run in another")
                print("terminal:")
                if broker.own:  # the secret key is for this development broker only
                    print(f"    export EMITTER_URL={broker.url} EMITTER_SECRET={broker.secret_key}")
                print("    emitter-anyio sub clock/tick/")
                print("    emitter-anyio request clock/ask/ ''")
                print(f"to stop it, press Ctrl-C, or run: kill {os.getpid()}", flush=True)
                await anext(aiter(signals))

            # Send the queued messages, disconnect, then end the other tasks.
            await emitter.disconnect()
            nursery.cancel_scope.cancel()
        print("clock service stopped")


if __name__ == "__main__":
    trio.run(main)
