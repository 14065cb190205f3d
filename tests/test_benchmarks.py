"""The harness of the benchmarks: what its report says, and that it runs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import cores, idle, report, sizing
from benchmarks.clients import common, us
from benchmarks.environments import requirements
from benchmarks.peer import Part
from benchmarks.report import Results
from benchmarks.rows import CLIENTS, CPU, P50, RATE, ROWS, Client, Row
from benchmarks.running import RunFailedError, RunningPeer, job_and_part, run, running_peer
from benchmarks.wire import KEY
from tests.support.background import background

ROW = {row.name: row for row in ROWS}
CLIENT = {client.name: client for client in CLIENTS}


def results(row: str, key: str, **figures: float) -> Results:
    made = Results()
    for client, value in figures.items():
        made.add(row, client.replace("_", "-"), {key: value})
    return made


def verdicts(made: Results) -> dict[tuple[str, str, str], tuple[str, float | None, bool | None]]:
    return {
        (v.client.name, v.goal.figure.key, v.goal.against): (v.reference, v.ratio, v.met)
        for v in report.judge(made.medians())
    }


class TestReport:
    def test_medians_include_all_rounds(self) -> None:
        made = Results()
        for rate in (5.0, 1.0, 3.0):
            made.add("receive", "gmqtt", {"rate": rate, "cpu_us": 1 / rate})
        assert made.medians() == {"receive": {"gmqtt": {"rate": 3.0, "cpu_us": 1 / 3}}}

    @pytest.mark.parametrize("reached", [149, 150])
    def test_rate_is_compared_with_fastest_peer(self, reached: float) -> None:
        told = verdicts(results("receive", "rate", us_trio=reached, gmqtt=100, zmqtt=50))
        assert told["us-trio", "rate", "fastest"] == ("gmqtt", reached / 100, reached == 150)

    @pytest.mark.parametrize("reached", [100, 101])
    def test_lower_time_is_better(self, reached: float) -> None:
        told = verdicts(results("round-trip", "p50_us", us_asyncio=reached, gmqtt=100, zmqtt=150))
        assert told["us-asyncio", "p50_us", "fastest"] == ("gmqtt", reached / 100, reached == 100)

    def test_mosquitto_is_not_compared_as_python_peer(self) -> None:
        told = verdicts(results("receive", "rate", us_trio=300, gmqtt=100, mosquitto=240))
        assert told["us-trio", "rate", "fastest"] == ("gmqtt", 3.0, True)
        assert told["us-trio", "rate", "mosquitto"] == ("mosquitto", 1.25, False)

    def test_client_on_uvloop_is_compared_with_peers_on_uvloop(self) -> None:
        made = results("receive", "rate", us_trio=300, us_uvloop=300, gmqtt=100, gmqtt_uvloop=250)
        told = verdicts(made)
        assert told["us-trio", "rate", "fastest"] == ("gmqtt", 3.0, True)
        assert told["us-uvloop", "rate", "fastest"] == ("gmqtt-uvloop", 1.2, False)

    def test_memory_is_not_compared_with_peers(self) -> None:
        told = verdicts(results("connections", "memory_kb", us_trio=61, gmqtt=25))
        assert told["us-trio", "memory_kb", "nothing"] == ("", 61, False)

    def test_fan_in_is_compared_with_one_subscription(self) -> None:
        made = results("fan-in-10", "cpu_us", us_trio=3, us_asyncio=5)
        made.runs |= results("fan-in-1", "cpu_us", us_trio=2.5, us_asyncio=4).runs
        told = verdicts(made)
        assert told["us-trio", "cpu_us", "row"] == ("fan-in-1", 1.2, True)
        assert told["us-asyncio", "cpu_us", "row"] == ("fan-in-1", 1.25, False)

    def test_summary_names_fastest_other_client(self) -> None:
        made = results("receive", "rate", us_asyncio=300, us_trio=200, gmqtt=100, zmqtt=50)
        made.runs |= results("connect", "p50_us", us_trio=900, emitter_io=700, zmqtt=800).runs
        made.about = {"date": "2026-01-02", "machine": "a machine", "Python": "3.11.1"}
        head, _, *lines = report.summary(made).splitlines()
        assert "2026-01-02, a machine, Python 3.11.1" in head
        assert "| receive, messages/s | 300 | 200 | 100 (gmqtt) | – | – |" in lines
        assert "| connect and close, µs | – | 900 | 700 (emitter-io) | 700 | – |" in lines
        assert "| publish, messages/s | – | – | – | – | – |" in lines

    def test_goal_without_peer_has_no_verdict(self) -> None:
        told = verdicts(results("publish", "rate", us_trio=300))
        assert told["us-trio", "rate", "fastest"] == ("", None, None)

    def test_report_is_formatted_as_table(self) -> None:
        made = results("publish", "rate", us_trio=300_000, us_asyncio=240_000, gmqtt=100_000)
        made.about = {"date": "2001-01-01", "machine": "a loom"}
        made.fail("publish", "zmqtt", "failed: alas")
        text = report.markdown(made)
        assert text.startswith("date: 2001-01-01; machine: a loom.\n")
        assert "Goals met: 1, not met: 1." in text
        assert "≥ 2.5 × the fastest Python peer" in text
        assert "| 240k (2.40 × gmqtt) ✗ | 300k (3.00 × gmqtt) ✓ |" in text
        assert "| emitter_anyio, Trio | 300k | – | 3.00 |" in text
        assert "| zmqtt | failed: alas |" in text

    def test_only_clients_near_fastest_peer_run_again(self) -> None:
        made = results("publish", "rate", us_trio=900, mqttium=300, gmqtt=100, zmqtt=99)
        assert report.near_the_fastest(made, ROW["publish"]) == {"us-trio", "mqttium", "gmqtt"}
        made = results("connect", "p50_us", us_trio=100, gmqtt=200, mqttium=600, zmqtt=601)
        assert report.near_the_fastest(made, ROW["connect"]) == {"us-trio", "gmqtt", "mqttium"}

    def test_mosquitto_does_not_count_as_fastest_peer(self) -> None:
        made = results("publish", "rate", us_trio=900, mqttium=300, mosquitto=1000, gmqtt=99)
        assert report.near_the_fastest(made, ROW["publish"]) == {"us-trio", "mqttium", "mosquitto"}

    def test_row_without_comparison_is_not_run_again(self) -> None:
        made = results("connections", "memory_kb", us_trio=100, gmqtt=100)
        assert report.near_the_fastest(made, ROW["connections"]) == set()

    def test_every_goal_refers_to_figure_of_its_row(self) -> None:
        for row in ROWS:
            assert {goal.figure for goal in row.goals} <= set(row.figures)
            assert {goal.row for goal in row.goals if goal.against == "row"} <= set(ROW)


class TestChoosing:
    def test_name_selects_all_variants_of_client(self) -> None:
        chosen = command.chosen(CLIENTS, "us,zmqtt", "client")
        assert [client.name for client in chosen] == ["us-asyncio", "us-uvloop", "us-trio", "zmqtt"]

    def test_unknown_name_is_rejected_and_known_names_are_listed(self) -> None:
        with pytest.raises(SystemExit, match=r"unknown row 'recieve': expected one of receive, "):
            command.chosen(ROWS, "receive,recieve", "row")

    def test_every_environment_is_pinned(self) -> None:
        for client in CLIENTS:
            if client.environment:
                assert all("==" in wanted for wanted in requirements(client.environment))

    def test_table_replaces_text_between_markers(self, tmp_path: Path) -> None:
        page = tmp_path / "benchmarks.md"
        page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nbehind\n")
        command.into_docs(page, "new\n")
        text = page.read_text()
        assert text == f"before\n{command.BEGIN}\nnew\n{command.END}\nbehind\n"


class TestClock:
    def test_percentiles_are_in_microseconds(self) -> None:
        seconds = [number / 1e6 for number in range(200, 0, -1)]
        told = common.percentiles(seconds)
        assert told == pytest.approx({P50.key: 101, "p99_us": 199})

    def test_ping_cost_excludes_cost_of_idling(self) -> None:
        quiet = common.Idling(seconds=10, processor=0.002, pings=0)
        pinging = common.Idling(seconds=10, processor=0.102, pings=1000)
        told = common.idle_figures(quiet, pinging)
        assert told == pytest.approx({"idle_ms": 2, "ping_us": 100})

    def test_connections_that_ping_are_not_idle(self) -> None:
        busy = common.Idling(seconds=10, processor=0.1, pings=7)
        with pytest.raises(SystemExit, match="have sent pings"):
            common.idle_figures(busy, busy)


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Iterator[tuple[common.Job, RunningPeer]]:
    """A peer for the row that the test names, and the parameters of the client."""
    row, messages, more = request.param
    told, part = job_and_part(row, CLIENT["us-trio"], messages, **more)
    with running_peer(part) as running:
        yield common.Job(**told, port=running.port), running


def rows(*chosen: tuple[str, int, dict[str, int]]) -> pytest.MarkDecorator:
    parameters = [(ROW[name], messages, more) for name, messages, more in chosen]
    return pytest.mark.parametrize(
        "peer", parameters, indirect=True, ids=[name for name, *_ in chosen]
    )


@pytest.mark.without_debug
class TestOurCases:
    @rows(
        ("receive", 300, {}),
        ("handler", 300, {}),
        ("fan-in-10", 300, {}),
        ("publish", 300, {}),
        ("confirmed-1", 20, {}),
        ("confirmed-20", 100, {}),
        ("ws-receive", 300, {}),
        ("ws-publish", 300, {}),
    )
    async def test_case_measures_rate_and_cpu_time(
        self, peer: tuple[common.Job, RunningPeer]
    ) -> None:
        job, _ = peer
        figures = await us.CASES[job.case](job)
        assert set(figures) == {RATE.key, CPU.key}
        assert all(math.isfinite(value) for value in figures.values())

    @rows(("round-trip", 20, {}), ("connect", 5, {}))
    async def test_case_measures_percentiles_of_time(
        self, peer: tuple[common.Job, RunningPeer]
    ) -> None:
        job, _ = peer
        figures = await us.CASES[job.case](job)
        assert 0 < figures["p50_us"] <= figures["p99_us"]

    @rows(("connections", 0, {"connections": 5}))
    async def test_connections_case_opens_all_connections(
        self, peer: tuple[common.Job, RunningPeer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(common, "SETTLING", 0)
        job, _ = peer
        await us.CASES[job.case](job)
        assert common.ask_peer(job.port)["messages"] == 5

    @rows(("stalled", 3000, {}))
    async def test_stalled_case_loses_no_uncounted_message(
        self, peer: tuple[common.Job, RunningPeer]
    ) -> None:
        job, _ = peer
        figures = await us.CASES[job.case](job)
        assert (figures["uncounted"], figures["lost_by_healthy"]) == (0, 0)


class TestRun:
    @pytest.mark.parametrize("client", ["us-asyncio", "us-trio"])
    def test_run_returns_figures(self, client: str) -> None:
        figures = run(ROW["receive"], CLIENT[client], sys.executable, 100)
        assert figures["rate"] > 0

    def test_failed_run_raises_error_with_reason(self) -> None:
        broken = Client("broken", "us", "trio")
        unknown = Row("none", "", "no such case", (), (), "none", 1, 1)
        with pytest.raises(RunFailedError, match="no such case"):
            run(unknown, broken, sys.executable, 1)


@pytest.mark.parametrize("name", sizing.CLIENT_CASES)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_sizing_measures_memory(
    name: str, anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "_COUNT", 40)
    # The memory of this process shrinks if earlier tests have just freed theirs.
    monkeypatch.setattr(common, "memory", count(0, 10_000_000).__next__)
    with running_peer(sizing.part_of(name)) as peer:
        assert await sizing.measure(name, f"mqtt://127.0.0.1:{peer.port}", KEY) > 0


class TestCores:
    @pytest.mark.parametrize("direction", ["receive", "publish"])
    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_rate_and_cpu_usage_are_measured(
        self, direction: cores.Direction, backend: str
    ) -> None:
        measurement = cores.Measurement(backend, 400, 64, None, KEY, None)
        result = measurement.run(direction, processes=2, connections=4)
        assert result.lost == 0
        assert result.rate > 0
        assert result.client_cores > 0

    @pytest.mark.parametrize("direction", ["receive", "publish"])
    def test_broker_cpu_usage_is_measured(self, direction: cores.Direction) -> None:
        with background() as there:
            key = there.key("cores/#/", "rw")
            measurement = cores.Measurement("asyncio", 400, 64, there.url, key, os.getpid())
            result = measurement.run(direction, processes=1, connections=2)
        assert result.lost == 0
        assert result.broker_cores is not None

    def test_run_without_messages_fails(self) -> None:
        with background() as there:
            key = there.key("cores/#/", "r")  # it does not permit the feeder to publish
            measurement = cores.Measurement("asyncio", 4, 64, there.url, key, None, silence=0.1)
            with pytest.raises(SystemExit, match="no message has arrived"):
                measurement.run("receive", processes=1, connections=1)

    def test_table_shows_medians_and_ratios(self) -> None:
        def results(*rates: float) -> list[cores.Result]:
            return [cores.Result(rate, 0.5, None, 0) for rate in rates]

        text = cores.table(
            {("receive", 1, 1): results(1000, 3000, 2000), ("receive", 2, 4): results(3000)}
        )
        assert "| receive | 1 | 1 | 2,000 | 1.00 | 0.50 | – | 0 |" in text
        assert "| receive | 2 | 4 | 3,000 | 1.50 | 0.50 | – | 0 |" in text


@pytest.mark.without_debug
class TestIdle:
    async def test_idle_connections_are_measured(
        self, anyio_backend: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(common, "SETTLING", 0)
        with running_peer(Part("many")) as peer:
            url, meter = f"mqtt://127.0.0.1:{peer.port}", sizing.BrokerMeter(peer.pid)
            figures = await idle.measure(idle.Options(url, 5, 0.1, (), peer.port, meter))
        assert figures["connections"] == 5
        assert figures["pings per second"] > 0

    def test_cost_of_pings_is_separated_from_idling(self) -> None:
        quiet = common.Idling(seconds=10, processor=0.002 + 0.05, pings=500)
        pinging = common.Idling(seconds=20, processor=0.004 + 0.3, pings=3000)
        assert idle.split(quiet, pinging) == pytest.approx((0.0002, 100e-6))

    @pytest.mark.parametrize("sources", [(), ("127.0.0.1",)], ids=["system", "source"])
    async def test_churn_replaces_connections(
        self, anyio_backend: object, sources: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with running_peer(Part("many")) as peer:
            url = f"mqtt://127.0.0.1:{peer.port}"
            await idle.churn(idle.Options(url, 3, 0, sources, peer.port, None), 0.1, 1000)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 11
        assert int(lines[-1].split()[2]) > 0
        assert peer.counted["connections"] == 3 + int(lines[-1].split()[2])

    def test_local_ports_and_descriptors_limit_connections(self) -> None:
        assert idle.most_connections(0) == idle.most_connections(1) <= idle.most_connections(2)
