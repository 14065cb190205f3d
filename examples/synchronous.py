"""
Synchronous code: threads share a client through a portal to an event loop.

Run it with a development broker:  python examples/synchronous.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. Three threads count
words and publish the results, which the main thread prints as they arrive.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from anyio.from_thread import BlockingPortal, start_blocking_portal

from emitter_anyio import ChannelKey, Emitter, connect
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "words/counted/"
TEXTS = {
    "haiku": "an old silent pond a frog jumps into the pond splash silence again",
    "proverb": "many hands make light work",
    "greeting": "hello world",
}


def count_words(portal: BlockingPortal, emitter: Emitter, key: ChannelKey, title: str) -> None:
    """Run in a worker thread. ``portal.call`` waits for the result, or raises the error."""
    message = {"title": title, "words": len(TEXTS[title].split())}
    # partial() because portal.call() takes no keyword arguments.
    portal.call(partial(emitter.publish, key, CHANNEL, message, qos=1, timeout=5))


def main(backend: str = "asyncio") -> None:
    with (
        # This thread runs the event loop. All calls of the client go through the portal to it.
        start_blocking_portal(backend) as portal,
        portal.wrap_async_context_manager(ConfiguredBroker()) as broker,
        portal.wrap_async_context_manager(connect(broker.url)) as emitter,
    ):
        key = portal.call(emitter.keygen, broker.secret_key, CHANNEL, "rw")
        with (
            portal.wrap_async_context_manager(emitter.subscribe(key, CHANNEL)) as results,
            ThreadPoolExecutor() as threads,
        ):
            counting = [threads.submit(count_words, portal, emitter, key, title) for title in TEXTS]
            for _ in TEXTS:
                result = portal.call(results.receive).as_object()
                print(f"{result['title']}: {result['words']} words")
            for each in counting:
                each.result()  # raise what the thread raised


if __name__ == "__main__":
    # Ctrl-C leaves each block: the client disconnects, and the thread of the event loop ends.
    with suppress(KeyboardInterrupt):
        main("trio" if "trio" in sys.argv else "asyncio")
