"""Latencies, numbers of messages, and the sum of several processes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._cli._bench_figures import Latencies, Measurement, Numbering, summarize

MILLISECOND = 1_000_000


class TestLatencies:
    def test_nothing_has_no_percentiles(self) -> None:
        assert Latencies().summary() is None

    def test_percentiles(self) -> None:
        latencies = Latencies()
        latencies.add(number * MILLISECOND for number in range(1, 101))
        assert latencies.summary() == {"p50": 50, "p90": 90, "p99": 99, "max": 100}

    def test_below_zero_counts_as_zero(self) -> None:
        latencies = Latencies()
        latencies.add([-5, -10 * MILLISECOND])
        assert latencies.summary() == {"p50": 0, "p90": 0, "p99": 0, "max": 0}

    def test_processes_are_merged_before_percentiles_are_computed(self) -> None:
        fast, slow, both = Latencies(), Latencies(), Latencies()
        fast.add([MILLISECOND] * 98)
        slow.add([1000 * MILLISECOND] * 2)
        for each in (fast, slow):
            both.merge(each.counts())
        assert both.summary() == {"p50": 1, "p90": 1, "p99": 1000, "max": 1000}

    @given(st.lists(st.integers(0, 10**13), min_size=1, max_size=50))
    def test_error_is_below_one_percent(self, values: list[int]) -> None:
        latencies = Latencies()
        latencies.add(values)
        summary = latencies.summary()
        assert summary is not None
        ordered = sorted(value // 1000 for value in values)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1)):
            exact = ordered[math.ceil(len(ordered) * share) - 1]
            assert exact * 0.99 <= summary[name] * 1000 <= exact

    def test_memory_is_bounded(self) -> None:
        latencies = Latencies()
        for start in range(10):
            latencies.add(range(start * 10**10, (start + 1) * 10**10, 10**6))
        assert len(latencies.counts()) < 6000
        assert sum(latencies.counts().values()) == 100_000


class TestNumbering:
    def test_missing_numbers_are_lost(self) -> None:
        numbering = Numbering()
        numbering.add([0, 1, 4])
        numbering.add([5, 8])
        assert (numbering.received, numbering.lost()) == (5, 4)
        assert numbering.lost(12) == 7
        assert (numbering.duplicates, numbering.reordered) == (0, 0)

    def test_everything_is_lost(self) -> None:
        assert Numbering().lost(3) == 3

    def test_late_number_is_not_lost(self) -> None:
        numbering = Numbering()
        numbering.add([0, 9, 4, 4, 0])
        assert (numbering.received, numbering.lost()) == (3, 7)
        assert (numbering.reordered, numbering.duplicates) == (1, 2)

    def test_numbers_before_the_first_are_not_expected(self) -> None:
        numbering = Numbering(100)
        numbering.add([100, 102])
        assert (numbering.received, numbering.lost()) == (2, 1)

    def test_absurd_number_takes_no_time(self) -> None:
        numbering = Numbering()
        numbering.add([2**64 - 1, 5])
        assert numbering.lost() == 2**64 - 2

    @given(st.lists(st.integers(0, 30), max_size=60), st.integers(31, 40))
    def test_counts_agree_with_a_set(self, numbers: list[int], published: int) -> None:
        numbering = Numbering()
        for start in range(0, len(numbers), 7):
            numbering.add(numbers[start : start + 7])
        assert numbering.received == len(set(numbers))
        assert numbering.duplicates == len(numbers) - len(set(numbers))
        assert numbering.lost(published) == published - len(set(numbers))


class TestSummary:
    def test_rate_is_that_of_the_whole_time(self) -> None:
        parts = [
            Measurement(messages=100, start=10**9, end=3 * 10**9, latencies={"1000": 100}),
            Measurement(messages=300, start=2 * 10**9, end=5 * 10**9, failed=2, lost=1),
            Measurement(error="not started"),
        ]
        summary = summarize(parts, 50)
        assert (summary["seconds"], summary["messages"]) == (4.0, 400)
        assert (summary["messages_per_second"], summary["bytes_per_second"]) == (100.0, 5000)
        assert summary["latency_ms"] == {"p50": 1, "p90": 1, "p99": 1, "max": 1}
        assert (summary["failed"], summary["lost"]) == (2, 1)

    @pytest.mark.parametrize("size", [None, 64])
    def test_nothing(self, size: int | None) -> None:
        summary = summarize([], size)
        assert summary["seconds"] == 0
        assert summary["latency_ms"] is None
        assert summary["connects_per_second" if size is None else "messages_per_second"] == 0
