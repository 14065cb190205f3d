"""
Write the inventories that Sphinx uses to link to Python, AnyIO and Trio.

Run ``python docs/inventories/make.py`` after adding a name below.

Sphinx would otherwise download inventories with thousands of names, but a build must not need a
network. These contain only the names to which the pages and docstrings refer. The build warns about
a missing name.
"""

from __future__ import annotations

import zlib
from pathlib import Path

FOLDER = Path(__file__).parent

# By project and page: the names, each with its role after a colon unless it is a class.
NAMES = {
    "python": {
        "library/asyncio-task.html": "asyncio.Task.cancel:method asyncio.TaskGroup "
        "asyncio.timeout:function asyncio.wait_for:function",
        "library/asyncio-runner.html": "asyncio.Runner",
        "library/contextlib.html": "contextlib.AbstractContextManager",
        "library/collections.abc.html": "collections.abc.AsyncGenerator "
        "collections.abc.AsyncIterator collections.abc.Awaitable collections.abc.Callable "
        "collections.abc.Iterable collections.abc.Iterator collections.abc.Mapping",
        "library/constants.html": "None:data True:data False:data",
        "library/datetime.html": "datetime.datetime",
        "library/exceptions.html": "Exception:exception ImportError:exception "
        "KeyboardInterrupt:exception LookupError:exception OSError:exception "
        "RuntimeError:exception RuntimeWarning:exception TimeoutError:exception "
        "TypeError:exception ValueError:exception ExceptionGroup:exception",
        "library/functions.html": "bool float int",
        "library/json.html": "json.dumps:function",
        "library/logging.html": "logging:module",
        "library/os.html": "os.PathLike",
        "library/pathlib.html": "pathlib.Path",
        "library/random.html": "random.seed:function",
        "library/ssl.html": "ssl.SSLContext ssl.create_default_context:function",
        "library/stdtypes.html": "bytearray bytes dict list memoryview str tuple",
        "library/time.html": "time.monotonic:function time.time:function",
        "library/typing.html": "typing.Any:data typing.Literal:data",
    },
    "anyio": {
        "api.html": "anyio.BrokenResourceError:exception anyio.ClosedResourceError:exception "
        "anyio.EndOfStream:exception anyio.WouldBlock:exception anyio.abc.ByteStreamConnectable "
        "anyio.abc.ObjectReceiveStream anyio.abc.TaskGroup anyio.abc.TaskStatus anyio.CancelScope "
        "anyio.create_task_group:function anyio.fail_after:function anyio.move_on_after:function "
        "anyio.open_signal_receiver:function anyio.run:function anyio.sleep_forever:function "
        "anyio.to_thread.run_sync:function anyio.to_process.run_sync:function "
        "anyio.CapacityLimiter anyio.from_thread.BlockingPortal "
        "anyio.streams.memory.MemoryObjectReceiveStream",
    },
    "trio": {
        "reference-core.html": "trio.Nursery trio.open_nursery:function trio.run:function "
        "trio.CancelScope",
        "reference-testing.html": "trio.testing.MockClock",
    },
}


def lines(project: str) -> list[str]:
    """Return the lines of an inventory."""
    found = []
    for page, names in NAMES[project].items():
        for entry in names.split():
            name, _, role = entry.partition(":")
            # Sphinx replaces "$" with the name.
            anchor = "module-$" if role == "module" else "$"
            found.append(f"{name} py:{role or 'class'} 1 {page}#{anchor} -\n")
    return sorted(found)


def inventory(project: str) -> bytes:
    """Return an inventory in the format that Sphinx reads."""
    head = (
        "# Sphinx inventory version 2\n"
        f"# Project: {project}\n"
        "# Version: \n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    return head.encode() + zlib.compress("".join(lines(project)).encode(), 9)


if __name__ == "__main__":
    for project in NAMES:
        (FOLDER / f"{project}.inv").write_bytes(inventory(project))
