"""
Make the inventories by which Sphinx links to Python, AnyIO and Trio.

``python docs/inventories/make.py`` writes them.

Sphinx would fetch them, each with thousands of names, and a build needs no network here. So they
hold just the names that our pages and docstrings refer to, at the addresses that they have there.
A build says which name is missing.
"""

from __future__ import annotations

import zlib
from pathlib import Path

FOLDER = Path(__file__).parent

# By project and page: names, and after a colon their role unless it is "class". "$" in an address
# stands for the name.
NAMES = {
    "python": {
        "library/asyncio-task.html": "asyncio.Task.cancel:method asyncio.timeout:function",
        "library/contextlib.html": "contextlib.AbstractContextManager",
        "library/collections.abc.html": "collections.abc.AsyncGenerator "
        "collections.abc.AsyncIterator collections.abc.Awaitable collections.abc.Callable "
        "collections.abc.Iterator collections.abc.Mapping",
        "library/constants.html": "None:data True:data False:data",
        "library/datetime.html": "datetime.datetime",
        "library/exceptions.html": "Exception:exception ImportError:exception "
        "KeyboardInterrupt:exception LookupError:exception OSError:exception "
        "RuntimeError:exception RuntimeWarning:exception TimeoutError:exception "
        "TypeError:exception ValueError:exception ExceptionGroup:exception",
        "library/functions.html": "bool float int",
        "library/logging.html": "logging:module",
        "library/ssl.html": "ssl.SSLContext ssl.create_default_context:function",
        "library/stdtypes.html": "bytearray bytes dict list memoryview str tuple",
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
    },
}


def lines(project: str) -> list[str]:
    """Give the lines of an inventory."""
    found = []
    for page, names in NAMES[project].items():
        for entry in names.split():
            name, _, role = entry.partition(":")
            anchor = "module-$" if role == "module" else "$"
            found.append(f"{name} py:{role or 'class'} 1 {page}#{anchor} -\n")
    return sorted(found)


def inventory(project: str) -> bytes:
    """Give an inventory as Sphinx reads it."""
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
