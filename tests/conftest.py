from __future__ import annotations

import os
import secrets
import signal
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from tests.support.leaks import Leaks, freeze_existing_objects
from tests.support.secrets import SecretWatcher
from tests.support.server import Server, real_server, runs_cluster

if TYPE_CHECKING:
    from emitter_anyio.testing import Broker

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT in background jobs, and processes that tests interrupt inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine, examples may take long.
hypothesis.settings.register_profile(
    "project",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")


def pytest_configure() -> None:
    try:
        real_server()
    except RuntimeError as exc:
        raise pytest.UsageError(str(exc)) from None


@pytest.fixture(scope="session", autouse=True)
def _plain_engine() -> Iterator[None]:
    """Turn off the fast path, so that Paho handles every packet, if EMITTER_PLAIN_ENGINE is set."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("EMITTER_PLAIN_ENGINE"):
            patch.setattr("emitter_anyio._net.opening.FAST_PATH", False)
        yield


def pytest_report_header() -> str:
    if real_server() is None:
        nodes = "two nodes of the" if runs_cluster() else "the"
        return f"EMITTER_URL not set: the client suite runs against {nodes} development broker"

    return "EMITTER_URL set: the client suite runs against that broker"


def pytest_collection_finish() -> None:
    freeze_existing_objects()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    figures = [figure for report in reports for figure in report.user_properties]
    if figures:
        terminalreporter.section("recorded figures")
    for what, value in sorted(figures):
        terminalreporter.write_line(f"{what}: {value}")


_SECRET_WATCHER = pytest.StashKey[SecretWatcher]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown" and (watcher := item.stash.get(_SECRET_WATCHER, None)) is not None:
        # The captured output is complete only after teardown.
        watcher.record("the captured output", f"{report.capstdout}{report.capstderr}")
        if (leaks := watcher.leaks()) and report.passed:
            report.outcome, report.longrepr = "failed", "\n".join(leaks)
    # pytest-xdist cannot send lone surrogates, which a test might log, to another process.
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def _blocking_calls_fail() -> Iterator[None]:
    # blockbuster only detects calls that block asyncio.
    with blockbuster_ctx("emitter_anyio") as guard:
        # The command line waits until these do not block.
        guard.functions["os.read"].can_block_in("emitter_anyio/_cli/_input.py", "chunks")
        guard.functions["io.TextIOWrapper.read"].can_block_in(
            "benchmarks/fleets.py", "resident_bytes"
        )
        guard.functions["os.write"].can_block_in("emitter_anyio/_cli/_output.py", "write")
        # Coverage takes a lock when another thread runs, such as a background broker's.
        lock = guard.functions["threading.Lock.acquire"]
        lock.can_block_in("coverage/collector.py", "lock_data")
        yield


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """
    Both backends, with virtual time for tests marked ``virtual_time``.

    asyncio is in debug mode if ``PYTHONASYNCIODEBUG`` is set, except in tests marked
    ``without_debug``.
    """
    from emitter_anyio.testing import virtual_backend

    options: dict[str, object] = {}
    if request.node.get_closest_marker("virtual_time"):
        _, options = virtual_backend(request.param)
    if request.param == "asyncio":
        options["debug"] = False if request.node.get_closest_marker("without_debug") else None

    return request.param, options


@pytest.fixture(autouse=True)
def _no_secrets_shown(request: pytest.FixtureRequest) -> Iterator[None]:
    if "anyio_backend" not in request.fixturenames:
        yield
        return
    watcher = request.node.stash[_SECRET_WATCHER] = SecretWatcher()
    watcher.start()
    yield
    watcher.stop()


@pytest.fixture(autouse=True)
def _check_for_leaks(request: pytest.FixtureRequest, _no_secrets_shown: None) -> None:
    # Set up first, so that it is torn down after every other fixture of an asynchronous test.
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("_no_leaks")


@pytest.fixture
async def _no_leaks(anyio_backend: object) -> AsyncIterator[None]:
    leaks = Leaks()
    yield
    leaks.check()


@pytest.fixture
async def server(anyio_backend: object, request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """
    A broker: a new development broker on loopback.

    In the client suite (marker ``emitter``), it is the real Emitter of ``EMITTER_URL`` if that is
    set, or has two nodes with ``EMITTER_NODES=2``.
    """
    from emitter_anyio.testing import Broker

    in_client_suite = request.node.get_closest_marker("emitter") is not None
    one_node = request.node.get_closest_marker("one_node") is not None
    async with AsyncExitStack() as stack:
        server = real_server() if in_client_suite else None
        if server is None:
            broker = await stack.enter_async_context(Broker(patience=0))
            other = broker
            if in_client_suite and runs_cluster():
                other = await stack.enter_async_context(Broker(cluster=broker, patience=0))
            place = broker.url, broker.host, broker.port, False
            server = Server(*place, broker.secret_key, other.url, broker)
        yield replace(server, other_url=server.url) if one_node else server


@pytest.fixture
async def broker(anyio_backend: object) -> AsyncIterator[Broker]:
    """A development broker, for tests that inspect or control it."""
    from emitter_anyio.testing import Broker

    async with Broker() as broker:
        yield broker


@pytest.fixture
def unique() -> str:
    """A channel, with a trailing slash, that no other test uses: tests may share a real broker."""
    return f"t{secrets.token_hex(4)}/"
