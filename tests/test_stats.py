"""The figures of Emitter's nodes, and Snappy, in which they are compressed."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio import NodeMetric, decode_stats
from emitter_anyio._values import snappy
from emitter_anyio.testing import _snappy
from emitter_anyio.testing._stats import Gauges, Stats
from tests.support.stats import RECORDED

START, END = (datetime(2026, 11, 30, 12, 25, second, tzinfo=UTC) for second in (17, 18))


def encode(*metrics: bytes, count: int | None = None) -> bytes:
    """Encode a snapshot of these metrics."""
    number = len(metrics) if count is None else count
    return _snappy.encode(_snappy.uvarint(number) + b"".join(metrics))


def metric(name: bytes, values: bytes = b"\2", times: bytes = b"\2\2\4") -> bytes:
    """Encode a metric with a count of 1, which began at 1 s and ended at 2 s."""
    sized = [_snappy.uvarint(len(each)) + each for each in (name, b"tag", values)]
    return b"".join(sized) + times


NAMES = (b"node.id", b"node.addr", b"node.conns", b"node.subs", b"node.peers", b"proc.uptime")


class TestRecorded:
    def test_figures_of_the_node(self) -> None:
        stats = decode_stats(RECORDED)
        assert (stats.node, stats.address) == ("00:00:00:00:00:01", "127.0.0.1:28500")
        assert (stats.connections, stats.subscriptions, stats.peers) == (1, 4, 1)
        assert (stats.uptime, stats.received, stats.sent) == (6, 7, 9)
        assert (stats.start, stats.end) == (START, END)

    def test_metrics(self) -> None:
        metrics = decode_stats(RECORDED).metrics
        assert len(metrics) == 32
        assert metrics["peer.msg"] == NodeMetric("peer.msg", "", 1, (42,), START, END)
        assert metrics["node.addr"] == NodeMetric("node.addr", "127.0.0.1:28500", 0, (), START, END)
        # Emitter 3.1 measures 0 for each packet, but the count is right.
        assert metrics["rcv.pub"] == NodeMetric("rcv.pub", "", 7, (0,) * 7, START, END)
        assert metrics["go.procs"].values == (2,)
        assert metrics["rcv.connect"].count == 0


class TestDevelopmentBroker:
    @given(
        st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3),
        st.integers(1_500_000_000, 2**32),
        st.dictionaries(st.sampled_from(["rcv.pub", "send.pub", "rcv.sub"]), st.integers(1, 5)),
    )
    def test_snapshot_is_decoded(self, gauges: list[int], now: int, counts: dict[str, int]) -> None:
        stats = Stats(bytes.fromhex("f01122334455"))
        stats.start(now)
        for name, count in counts.items():
            for _ in range(count):
                stats.count(name)
        found = decode_stats(stats.snapshot(now + 1.5, "host:1", Gauges(*gauges)))
        assert (found.node, found.address) == ("f0:11:22:33:44:55", "host:1")
        assert [found.connections, found.subscriptions, found.peers] == gauges
        assert (found.received, found.sent) == (counts.get("rcv.pub", 0), counts.get("send.pub", 0))
        assert (found.start.timestamp(), found.end.timestamp()) == (now, now + 1)
        assert found.uptime == 1
        assert found.metrics["node.id"].values == (0x22334455,)
        again = decode_stats(stats.snapshot(now + 2, "host:1", Gauges(*gauges)))
        assert (again.received, again.start, again.uptime) == (0, found.end, 2)

    def test_node_number_has_a_sign(self) -> None:
        """Emitter casts the number of the node to 32 bits."""
        stats = Stats(bytes.fromhex("0000ffffffff"))
        found = decode_stats(stats.snapshot(1, "", Gauges(0, 0, 0)))
        assert found.metrics["node.id"].values == (-1,)


class TestMalformed:
    @given(st.binary(max_size=200))
    def test_any_bytes_are_decoded_or_raise_value_error(self, data: bytes) -> None:
        for payload in (data, _snappy.encode(data)):
            with suppress(ValueError):
                decode_stats(payload)

    def test_minimum(self) -> None:
        stats = decode_stats(encode(*map(metric, NAMES)))
        assert (stats.node, stats.connections, stats.received, stats.sent) == ("tag", 1, 0, 0)

    @pytest.mark.parametrize("name", NAMES)
    def test_missing_metric(self, name: bytes) -> None:
        rest = [metric(each) for each in NAMES if each != name]
        with pytest.raises(ValueError, match=f"the metric '{name.decode()}' is missing"):
            decode_stats(encode(*rest))

    @pytest.mark.parametrize(
        ("payload", "reason"),
        [
            pytest.param(b"", "malformed block: it is incomplete", id="empty"),
            pytest.param(encode(), "the metric 'node.id' is missing", id="no metric"),
            pytest.param(encode(count=1), "it is incomplete", id="fewer metrics than stated"),
            pytest.param(encode(b"\7abc"), "it is incomplete", id="half a name"),
            pytest.param(encode(b"\0\0\0\0\0"), "it is incomplete", id="half a metric"),
            pytest.param(encode(metric(b"a"), b"x", count=1), "bytes follow", id="trailing bytes"),
            pytest.param(encode(metric(b"\xff")), "'utf-8' codec", id="name is not UTF-8"),
            pytest.param(encode(metric(b"a", b"\x80")), "it is incomplete", id="half a value"),
            pytest.param(
                encode(metric(b"a", b"\x80" * 10 + b"\1")), "more than 64 bits", id="large value"
            ),
            pytest.param(
                encode(metric(b"a", times=b"\2" + (b"\xff" * 9 + b"\1") * 2)),
                "",
                id="time outside of the calendar",
            ),
            pytest.param(
                encode(
                    metric(b"node.conns", b""),
                    *(metric(each) for each in NAMES if each != b"node.conns"),
                ),
                "it is incomplete",
                id="gauge without a value",
            ),
        ],
    )
    def test_reason_is_stated(self, payload: bytes, reason: str) -> None:
        with pytest.raises(ValueError, match=f"^invalid snapshot of a node's figures: .*{reason}"):
            decode_stats(payload)

    @pytest.mark.parametrize("payload", ["text", None, bytearray(b"a")])
    def test_other_types_are_rejected(self, payload: Any) -> None:
        with pytest.raises(TypeError, match="payload must be bytes, not"):
            decode_stats(payload)


class TestSnappy:
    @given(st.binary(max_size=400))
    def test_encoded_data_is_decoded(self, data: bytes) -> None:
        assert snappy.decode(_snappy.encode(data)) == data

    @given(st.binary(max_size=80))
    def test_any_bytes_are_decoded_or_raise_value_error(self, data: bytes) -> None:
        try:
            found = snappy.decode(data)
        except ValueError:
            return
        assert snappy.read_uvarint(data, 0)[0] == len(found)

    @pytest.mark.parametrize(
        ("block", "data"),
        [
            pytest.param("00", "", id="empty"),
            pytest.param("0308616263", "abc", id="literal"),
            pytest.param("03f002616263", "abc", id="literal, length in one byte"),
            pytest.param("03f40200616263", "abc", id="literal, length in two bytes"),
            pytest.param("0708616263 0103", "abcabca", id="copy of 4, offset in 11 bits"),
            pytest.param("0608616263 0a0300", "abcabc", id="copy, offset in two bytes"),
            pytest.param("0608616263 0b03000000", "abcabc", id="copy, offset in four bytes"),
            pytest.param("060061 1201 00", "aaaaaa", id="copy that runs into itself"),
        ],
    )
    def test_each_kind_of_element_is_decoded(self, block: str, data: str) -> None:
        assert snappy.decode(bytes.fromhex(block)) == data.encode()

    @pytest.mark.parametrize(
        "block",
        [
            pytest.param("", id="nothing"),
            pytest.param("80", id="half a length"),
            pytest.param("0408616263", id="shorter than it says"),
            pytest.param("0208616263", id="longer than it says"),
            pytest.param("03086162", id="half a literal"),
            pytest.param("0701", id="half a copy"),
            pytest.param("040103", id="a copy of nothing"),
            pytest.param("0700610103", id="a copy from before the start"),
            pytest.param("0500610100", id="a copy from where it is"),
        ],
    )
    def test_malformed_block_raises_value_error(self, block: str) -> None:
        with pytest.raises(ValueError, match="malformed block"):
            snappy.decode(bytes.fromhex(block))
