"""The order in which messages are sent, against a model of the file."""

from __future__ import annotations

import math
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emitter_anyio.outbox import _schedule
from emitter_anyio.outbox._schedule import Fetch, Fetched, Lane, Schedule
from emitter_anyio.outbox._values import Stored

READ_AT_ONCE = 3
LOW_WATER = 2


def stored(id: int, channel: str) -> Stored:
    return Stored(id, channel, b"", None, False, True, 0)


class File:
    """The messages on disk."""

    def __init__(self) -> None:
        self.messages: dict[int, Stored] = {}

    def read(self, fetch: Fetch) -> Fetched:
        last, end = fetch.until, True
        found = []
        if fetch.after is not None:
            later = sorted(id for id in self.messages if id > fetch.after)
            read, end = later[:READ_AT_ONCE], len(later) < READ_AT_ONCE
            last = read[-1] if read else fetch.after
            found = [self.messages[id] for id in read]
        lanes = []
        for channel in fetch.lanes:
            of_lane = [
                message
                for id, message in sorted(self.messages.items())
                if message.channel == channel and id <= last
            ]
            complete = len(of_lane) <= READ_AT_ONCE
            lanes.append(Lane(channel, of_lane[:READ_AT_ONCE], complete))
        kept = [message for message in found if message.channel not in fetch.without]
        return Fetched(kept, last, end, lanes)


class Sending(RuleBasedStateMachine):
    """An outbox whose file, connection and key functions behave as Hypothesis chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(_schedule, "_LOW_WATER", LOW_WATER)
        self.schedule = Schedule()
        self.file = File()
        self.in_flight: deque[Stored] = deque()
        self.reading: tuple[Fetch, Fetched] | None = None
        self.waiting: set[str] = set()
        self.next_id = 1
        self.now = 0.0

    def teardown(self) -> None:
        self.finish_reading()
        self.flow()
        assert not self.file.messages
        assert self.schedule.wanted(math.inf) is None
        self.patch.undo()

    def flow(self) -> None:
        """Send everything, without failures."""
        self.now = 1e9
        for channel in self.waiting:
            self.schedule.resume(channel, 0)
        for _ in range(10 * self.next_id + 10):
            while self.in_flight:
                self.accept()
            self.read()
            self.finish_reading()
            self.send()

    @precondition(lambda self: not self.reading)
    @rule(channel=st.sampled_from("abc"))
    def store(self, channel: str) -> None:
        self.file.messages[self.next_id] = stored(self.next_id, channel)
        self.next_id += 1
        self.schedule.grow()

    @precondition(lambda self: not self.reading)
    @rule()
    def read(self) -> None:
        fetch = self.schedule.wanted(self.now)
        if fetch is not None:
            self.reading = fetch, self.file.read(fetch)

    @precondition(lambda self: self.reading)
    @rule(fails=st.booleans())
    def finish_reading(self, fails: bool = False) -> None:
        if self.reading is not None:
            (fetch, fetched), self.reading = self.reading, None
            self.schedule.add(fetch, None if fails else fetched)

    @rule()
    def send(self) -> None:
        message = self.schedule.next()
        if message is None:
            return
        flying = [each.id for each in self.in_flight if each.channel == message.channel]
        assert all(id < message.id for id in flying)
        before = [
            id
            for id, each in self.file.messages.items()
            if each.channel == message.channel and id < message.id and id not in flying
        ]
        assert not before, "an older message of the channel was left out"
        assert message.id in self.file.messages
        self.in_flight.append(message)

    @precondition(lambda self: self.in_flight)
    @rule()
    def accept(self) -> None:
        message = self.in_flight.popleft()
        # A message that the broker could not process is overtaken by later ones in flight.
        del self.file.messages[message.id]
        self.schedule.finish(message)

    @precondition(lambda self: self.in_flight)
    @rule(delay=st.sampled_from([0, 1, math.inf]))
    def fail_whole_channel(self, delay: float) -> None:
        channel = self.in_flight[0].channel
        failed = [message for message in self.in_flight if message.channel == channel]
        self.in_flight = deque(each for each in self.in_flight if each.channel != channel)
        for message in failed:
            self.schedule.postpone(message, self.now + delay)
        self.waiting.add(channel)

    @rule()
    def lose_connection(self) -> None:
        while self.in_flight:
            self.schedule.finish(self.in_flight.popleft())
        if self.reading is not None:
            self.finish_reading()
        self.schedule.restart()

    @rule(channel=st.sampled_from("abc"))
    def resume(self, channel: str) -> None:
        self.schedule.resume(channel, self.now)

    @rule(seconds=st.sampled_from([0.5, 2]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def due_is_reported(self) -> None:
        assert self.schedule.next_due(self.now) > self.now


TestSending = Sending.TestCase
TestSending.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_waiting_channel_does_not_delay_others() -> None:
    schedule, file = Schedule(), File()
    for id in range(1, 2001):
        file.messages[id] = stored(id, "a" if id < 2000 else "b")
    schedule.grow()

    def fill() -> None:
        while (fetch := schedule.wanted(0)) is not None:
            schedule.add(fetch, file.read(fetch))

    fill()
    first = schedule.next()
    assert first is not None
    assert first.id == 1
    schedule.postpone(first, 10)
    fill()
    second = schedule.next()
    assert second is not None
    assert second.channel == "b"
    assert schedule.next_due(0) == 10


def test_channel_with_many_messages_is_sent_in_parts() -> None:
    schedule, file = Schedule(), File()
    for id in range(1, 11):
        file.messages[id] = stored(id, "a")

    def read() -> Fetch | None:
        fetch = schedule.wanted(0)
        if fetch is not None:
            schedule.add(fetch, file.read(fetch))
        return fetch

    while read() is not None:
        pass
    message = schedule.next()
    assert message is not None
    schedule.postpone(message, 0)
    received = []
    while read() is not None:
        while (message := schedule.next()) is not None:
            received.append(message.id)
            del file.messages[message.id]
            schedule.finish(message)
    assert received == list(range(1, 11))


def test_second_failure_postpones_channel_again() -> None:
    schedule, file = Schedule(), File()
    for id in (1, 2):
        file.messages[id] = stored(id, "a")
    fetch = schedule.wanted(0)
    assert fetch is not None
    schedule.add(fetch, file.read(fetch))
    first, second = schedule.next(), schedule.next()
    assert first is not None
    assert second is not None
    schedule.postpone(first, 5)
    schedule.postpone(second, 7)
    assert schedule.next_due(0) == 7
    schedule.resume("a", 3)
    schedule.resume("b", 3)
    assert schedule.next_due(0) == 3


def test_restart_forgets_what_was_read() -> None:
    schedule, file = Schedule(), File()
    for id in range(1, 9):
        file.messages[id] = stored(id, "a")
    fetch = schedule.wanted(0)
    assert fetch is not None
    fetched = file.read(fetch)
    schedule.restart()
    schedule.add(fetch, fetched)
    assert schedule.next() is None
    fetch = schedule.wanted(0)
    assert fetch is not None
    schedule.add(fetch, file.read(fetch))
    message = schedule.next()
    assert message is not None
    schedule.postpone(message, 0)
    fetch = schedule.wanted(0)
    assert fetch is not None
    schedule.add(fetch, file.read(fetch))
    schedule.restart()
    fetch = schedule.wanted(0)
    assert fetch is not None
    assert (fetch.after, fetch.without, fetch.lanes) == (0, frozenset(), ())
