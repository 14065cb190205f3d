from __future__ import annotations

import os
import secrets
import signal
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from tests.support.clock import virtual_time_options
from tests.support.leaks import Leaks, freeze_what_is_there
from tests.support.secrets import Witness
from tests.support.server import Server, real_server, runs_cluster

if TYPE_CHECKING:
    from emitter_anyio.testing import Broker

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs behind it so, and the programs that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test measures the time: an example of Hypothesis has no deadline, and drawing it may take long.
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
    """Turn the fast path off, so that Paho carries every packet, if EMITTER_PLAIN_ENGINE is set."""
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
    freeze_what_is_there()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    figures = [figure for report in reports for figure in report.user_properties]
    if figures:
        terminalreporter.section("figures that tests recorded")
    for what, value in sorted(figures):
        terminalreporter.write_line(f"{what}: {value}")


_WITNESS = pytest.StashKey[Witness]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown" and (witness := item.stash.get(_WITNESS, None)) is not None:
        # Only here is all that a test has printed together.
        witness.note("what was printed", f"{report.capstdout}{report.capstderr}")
        if (leaks := witness.leaks()) and report.passed:
            report.outcome, report.longrepr = "failed", "\n".join(leaks)
    # What a test has logged goes to another process, which takes no lone surrogates.
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def _blocking_calls_fail() -> Iterator[None]:
    # Sees asyncio only.
    with blockbuster_ctx("emitter_anyio") as guard:
        # The command line has waited until these do not block.
        guard.functions["os.read"].can_block_in("emitter_anyio/_cli/_input.py", "chunks")
        guard.functions["os.write"].can_block_in("emitter_anyio/_cli/_output.py", "write")
        # Coverage keeps the threads apart for which a background broker runs.
        lock = guard.functions["threading.Lock.acquire"]
        lock.can_block_in("coverage/collector.py", "lock_data")
        yield


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """
    Both backends, with virtual time for tests that ask for it.

    asyncio is in debug mode when ``PYTHONASYNCIODEBUG`` is set, but for tests that do without.
    """
    options: dict[str, Any] = {}
    if request.node.get_closest_marker("virtual_time"):
        options = virtual_time_options(request.param)
    if request.param == "asyncio":
        options["debug"] = False if request.node.get_closest_marker("without_debug") else None

    return request.param, options


@pytest.fixture(autouse=True)
def _secrets_stay_secret(request: pytest.FixtureRequest) -> Iterator[None]:
    if "anyio_backend" not in request.fixturenames:
        yield
        return
    witness = request.node.stash[_WITNESS] = Witness()
    witness.begin()
    yield
    witness.end()


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest, _secrets_stay_secret: None) -> None:
    # Set up before, and so torn down after, every other fixture of an asynchronous test.
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
    A broker: a development broker of the test's own, on loopback.

    For the client suite (marker ``emitter``) it is the real one of ``EMITTER_URL``, when set, or
    has two nodes, with ``EMITTER_NODES=2``.
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
    """A development broker, for tests that look into it."""
    from emitter_anyio.testing import Broker

    async with Broker() as broker:
        yield broker


@pytest.fixture
def unique() -> str:
    """A channel that no other test uses, with its slash: tests may share a real broker."""
    return f"t{secrets.token_hex(4)}/"
