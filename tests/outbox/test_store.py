"""The file of an outbox: what is on disk, and what happens to a file that cannot be used."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emitter_anyio.outbox import OutboxError, OutboxFullError, OutboxInUseError
from emitter_anyio.outbox import _store as store_module
from emitter_anyio.outbox._schedule import Fetch
from emitter_anyio.outbox._store import Outcome, Overflow, Parking, Store, Work
from emitter_anyio.outbox._values import Record, Stored
from tests.support.command import clean_environment

DAY = 24 * 3600.0
EVERYTHING = Fetch(0, 0, frozenset(), 0, ())
REFUSED = Parking("refused", 401)


def make(
    path: Path, max_size: int = 2**30, max_age: float = 7 * DAY, overflow: Overflow = "raise"
) -> Store:
    return Store(str(path), max_size, max_age, overflow)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Store]:
    store = make(path, **options)
    store.open()
    try:
        yield store
    finally:
        store.close()


def record(payload: bytes = b"x", channel: str = "a/", ttl: int | None = None) -> Record:
    return Record(channel, payload, ttl, False, True)


def write(store: Store, *payloads: bytes, ttl: int | None = None) -> Outcome:
    return store.apply(Work([record(payload, ttl=ttl) for payload in payloads]))


def read(store: Store) -> list[Stored]:
    fetched = store.apply(Work(fetch=EVERYTHING)).fetched
    assert fetched is not None
    return fetched.messages


def payloads(store: Store) -> list[bytes]:
    return [message.payload for message in read(store)]


def change(store: Store, message: Stored, what: Any) -> Outcome:
    return store.apply(Work(changes={message.id: (message, what)}))


class Clocks:
    """The clocks of the system, as a test sets them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wall = time.time()
        self.steady = 1000.0
        patch.setattr(time, "time", lambda: self.wall)
        patch.setattr(store_module, "_steady", lambda: self.steady)

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


class Model(RuleBasedStateMachine):
    """The file against lists in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.path = Path(self.directory, "out.db")
        self.numbers = count()
        self.waiting: list[bytes] = []
        self.parked: list[bytes] = []
        self.store = make(self.path, max_size=2000)
        self.store.open()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    @rule(number=st.integers(1, 4), size=st.integers(0, 300))
    def write(self, number: int, size: int) -> None:
        made = [b"%d " % next(self.numbers) + b"x" * size for _ in range(number)]
        outcome = write(self.store, *made)
        for payload, error in zip(made, outcome.errors, strict=True):
            if error is None:
                self.waiting.append(payload)
            else:
                assert isinstance(error, OutboxFullError)
                assert self.weight + 130 + len(payload) > 2000

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), what=st.sampled_from(["accepted", REFUSED]))
    def change(self, data: st.DataObject, what: Any) -> None:
        message = data.draw(st.sampled_from(read(self.store)))
        change(self.store, message, what)
        self.waiting.remove(message.payload)
        if what is REFUSED:
            self.parked.append(message.payload)
        # The change is recorded again if the outcome of writing it was lost.
        change(self.store, message, what)

    @rule()
    def retry_all(self) -> None:
        self.waiting += [message.binary for message in self.store.parked()]
        self.store.retry(None)
        self.parked = []

    @precondition(lambda self: self.parked)
    @rule(data=st.data(), retry=st.booleans())
    def move(self, data: st.DataObject, retry: bool) -> None:
        message = data.draw(st.sampled_from(self.store.parked()))
        assert (self.store.retry if retry else self.store.drop)([message.id, message.id]) == 1
        self.parked.remove(message.binary)
        if retry:
            self.waiting.append(message.binary)
        assert self.store.drop([message.id]) == 0

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = make(self.path, max_size=2000)
        assert self.store.open() is None

    @property
    def weight(self) -> int:
        return sum(len(payload) + 130 for payload in (*self.waiting, *self.parked))

    @invariant()
    def file_has_what_it_should(self) -> None:
        assert payloads(self.store) == self.waiting
        assert sorted(m.binary for m in self.store.parked()) == sorted(self.parked)
        figures = self.store.figures
        assert (figures.waiting, figures.parked) == (len(self.waiting), len(self.parked))
        assert figures.size == self.weight
        assert (figures.oldest is None) == (not self.waiting)
        assert figures.given_up == 0


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


class TestOpening:
    def test_file_is_readable_only_by_its_owner(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"x")
            for file in (path, path.with_name("out.db-wal")):
                assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_messages_survive_closing(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"1", b"2")
            (first, _) = read(store)
            change(store, first, REFUSED)
        with opened(path) as store:
            assert payloads(store) == [b"2"]
            (parked,) = store.parked()
            assert (parked.id, parked.channel, parked.binary) == (first.id, "a/", b"1")
            assert (parked.reason, parked.status) == REFUSED

    def test_ids_are_not_used_again(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"1")
            (first,) = read(store)
            change(store, first, "accepted")
        with opened(path) as store:
            write(store, b"2")
            assert read(store)[0].id > first.id

    def test_second_outbox_in_this_process_is_rejected(self, path: Path) -> None:
        with opened(path) as store:
            with pytest.raises(OutboxInUseError, match="another process or another Outbox"):
                make(path).open()
            # The lock outlives the attempt.
            assert "OutboxInUseError" in open_elsewhere(path)
            assert write(store, b"1").errors == [None]

    def test_second_process_is_rejected_until_the_first_one_closes(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"1")
            assert "OutboxInUseError" in open_elsewhere(path)
        assert open_elsewhere(path) == "None\n"

    def test_missing_directory_is_named(self, path: Path) -> None:
        with pytest.raises(OutboxError, match=r"no/out\.db.*directory does not exist"):
            make(path.parent / "no" / "out.db").open()

    def test_directory_is_rejected(self, path: Path) -> None:
        path.mkdir()
        with pytest.raises(OutboxError, match="cannot open the outbox"):
            make(path).open()

    def test_database_of_another_program_is_left_alone(self, path: Path) -> None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE t (x)")
        other.close()
        before = path.read_bytes()
        with pytest.raises(OutboxError, match="another program"):
            make(path).open()
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["out.db"]

    def test_newer_format_is_left_alone(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"1")
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 2")
        other.close()
        before = path.read_bytes()
        with pytest.raises(OutboxError, match=r"version 2.*version 1"):
            make(path).open()
        assert path.read_bytes() == before

    def test_closing_twice_is_allowed_and_a_closed_file_is_not_used(self, path: Path) -> None:
        with opened(path) as store:
            store.close()
            outcome = store.apply(Work([record()], {}, EVERYTHING))
            assert isinstance(outcome.errors[0], OutboxError)
            assert isinstance(outcome.read_error, OutboxError)
            for call in (store.parked, lambda: store.retry(None)):
                with pytest.raises(OutboxError, match="closed"):
                    call()

    def test_closed_file_is_not_opened_later(self, path: Path) -> None:
        # On asyncio, a thread might start after the task that waits for it was cancelled.
        store = make(path)
        store.close()
        with pytest.raises(OutboxError, match="closed"):
            store.open()
        assert not path.exists()

    def test_error_other_than_corruption_is_raised(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(path) as store:
            write(store, b"1")

        def fail(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "_save_clock", fail)
            with pytest.raises(OutboxError, match="disk I/O error"):
                make(path).open()
        with opened(path) as store:
            assert payloads(store) == [b"1"]

    def test_platform_that_cannot_open_directories_is_supported(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
        with opened(path) as store:
            assert write(store, b"1").errors == [None]


class TestCorruptFile:
    def check_set_aside(self, path: Path) -> Path:
        before = path.read_bytes()
        store = make(path)
        aside = store.open()
        try:
            assert aside is not None
            assert aside.startswith(f"{path}.corrupt-")
            assert Path(aside).read_bytes() == before
            assert write(store, b"new").errors == [None]
            assert payloads(store) == [b"new"]
        finally:
            store.close()
        return Path(aside)

    def test_other_contents_are_set_aside(self, path: Path) -> None:
        path.write_bytes(b"anything else" * 1000)
        self.check_set_aside(path)

    def test_each_corrupt_file_gets_a_separate_name(self, path: Path) -> None:
        asides = set()
        for number in range(3):
            path.write_bytes(b"file %d" % number * 1000)
            asides.add(self.check_set_aside(path))
        assert len(asides) == 3
        assert sorted(each.read_bytes()[:6] for each in asides) == [b"file 0", b"file 1", b"file 2"]

    def test_damaged_pages_are_set_aside(self, path: Path) -> None:
        with opened(path) as store:
            write(store, *[b"x" * 1000] * 100)
        data = bytearray(path.read_bytes())
        data[8192 : 8192 + 20000] = b"\x55" * 20000
        path.write_bytes(data)
        self.check_set_aside(path)

    def test_truncated_file_is_set_aside(self, path: Path) -> None:
        with opened(path) as store:
            write(store, *[b"x" * 1000] * 100)
        path.write_bytes(path.read_bytes()[:40000])
        self.check_set_aside(path)

    @pytest.mark.parametrize("statement", ["DROP TABLE state", "DELETE FROM state"])
    def test_file_without_its_tables_is_set_aside(self, path: Path, statement: str) -> None:
        with opened(path):
            pass
        with sqlite3.connect(path) as other:
            other.execute(statement)
        other.close()
        with opened(path) as store:
            assert write(store, b"1").errors == [None]
        assert len(list(path.parent.glob("*.corrupt-*"))) == 1

    def test_log_of_an_empty_file_is_set_aside(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"1")
            log = path.with_name("out.db-wal").read_bytes()
        path.write_bytes(b"")
        path.with_name("out.db-wal").write_bytes(log)
        aside = self.check_set_aside(path)
        assert aside.with_name(f"{aside.name}-wal").read_bytes() == log

    def test_file_that_another_process_has_replaced_is_not_set_aside(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path.write_bytes(b"anything else" * 1000)
        other = path.with_name("other")
        with opened(other):
            pass

        def replace(*_: object) -> bool:
            if other.exists():
                os.rename(other, path)
            return False

        monkeypatch.setattr(os.path, "lexists", replace)
        with pytest.raises(OutboxError, match="another process has replaced"):
            make(path).open()
        monkeypatch.undo()
        store = make(path)
        assert store.open() is None
        store.close()

    def test_file_of_process_killed_during_creation_is_not_corrupt(self, path: Path) -> None:
        path.touch()
        path.with_name("out.db-journal").write_bytes(b"\0" * 512)
        with opened(path) as store:
            assert write(store, b"1").errors == [None]
        assert list(path.parent.glob("*.corrupt-*")) == []


class TestBounds:
    def test_message_too_large_for_space_is_rejected_and_smaller_is_stored(
        self, path: Path
    ) -> None:
        with opened(path, max_size=1024) as store:
            outcome = write(store, b"x" * 500, b"x" * 500, b"x" * 100)
            assert [type(error) for error in outcome.errors] == [
                type(None),
                OutboxFullError,
                type(None),
            ]
            assert outcome.given_up == {}
            assert "max_size" in str(outcome.errors[1])
            assert store.figures.size == 500 + 100 + 2 * 130

    def test_oldest_messages_are_given_up_for_space(self, path: Path) -> None:
        with opened(path, max_size=1024, overflow="drop_oldest") as store:
            write(store, b"1" * 200, b"2" * 200, b"3" * 200)
            change(store, read(store)[1], REFUSED)
            outcome = write(store, b"4" * 200)
            assert outcome.errors == [None]
            assert outcome.given_up == {"no space": 1}
            assert [payload[:1] for payload in payloads(store)] == [b"3", b"4"]
            outcome = write(store, b"5" * 600)
            assert outcome.given_up == {"no space": 3}
            assert store.parked() == []
            assert isinstance(write(store, b"x" * 1024).errors[0], OutboxFullError)
        with opened(path) as store:
            assert store.figures.given_up == 4

    def test_old_messages_are_given_up(self, path: Path, clocks: Clocks) -> None:
        with opened(path) as store:
            write(store, b"1", b"2")
            change(store, read(store)[0], REFUSED)
            clocks.pass_time(6 * DAY)
            write(store, b"3")
            clocks.pass_time(DAY)
            outcome = store.apply(Work())
            assert outcome.given_up == {"too old": 2}
            assert payloads(store) == [b"3"]
            assert store.figures.given_up == 2

    def test_expired_messages_are_given_up_for_space(self, path: Path, clocks: Clocks) -> None:
        with opened(path, max_size=1024) as store:
            write(store, b"1" * 400, ttl=100)
            clocks.pass_time(50)
            assert isinstance(write(store, b"2" * 600).errors[0], OutboxFullError)
            clocks.pass_time(50)
            outcome = write(store, b"2" * 600)
            assert outcome.errors == [None]
            assert outcome.given_up == {"ttl has passed": 1}

    def test_message_that_was_given_up_is_not_parked(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"1")
            (message,) = read(store)
            change(store, message, "too old")
            assert change(store, message, REFUSED).parked == []
            assert store.figures.parked == 0


class TestClocks:
    def test_setting_clock_does_not_age_messages(self, path: Path, clocks: Clocks) -> None:
        with opened(path) as store:
            write(store, b"1", ttl=100)
            for jump in (50 * 365 * DAY, -60 * 365 * DAY):
                clocks.wall += jump
                assert store.apply(Work()).given_up == {}
            assert payloads(store) == [b"1"]
            assert store.now() - read(store)[0].published == 0

    def test_time_while_file_is_closed_counts(self, path: Path, clocks: Clocks) -> None:
        with opened(path) as store:
            write(store, b"1")
        clocks.wall += 7 * DAY
        with opened(path) as store:
            assert store.apply(Work()).given_up == {"too old": 1}

    def test_clock_set_back_before_opening_counts_as_no_time(
        self, path: Path, clocks: Clocks
    ) -> None:
        with opened(path) as store:
            write(store, b"1")
        clocks.wall -= 10 * 365 * DAY
        with opened(path) as store:
            assert store.apply(Work()).given_up == {}
            assert store.now() - read(store)[0].published == 0

    def test_time_is_written_periodically(self, path: Path, clocks: Clocks) -> None:
        with opened(path) as store:
            clocks.pass_time(100)
            write(store, b"1")
            shutil.copytree(path.parent, path.parent / "copy")  # what a kill would leave
        with opened(path.parent / "copy" / "out.db") as store:
            assert store.now() == 100


class TestReading:
    def test_large_messages_are_read_in_parts(self, path: Path) -> None:
        with opened(path) as store:
            write(store, *[b"x" * 60_000] * 40)
            fetch, found = EVERYTHING, []
            while True:
                fetched = store.apply(Work(fetch=fetch)).fetched
                assert fetched is not None
                assert sum(len(message.payload) for message in fetched.messages) < 1_200_000
                found += fetched.messages
                if fetched.end:
                    break
                fetch = fetch._replace(after=fetched.last)
            assert [message.id for message in found] == list(range(1, 41))

    def test_single_channels_are_read_up_to_message_id(self, path: Path) -> None:
        with opened(path) as store:
            store.apply(Work([record(b"%d" % n, "ab"[n % 2] + "/") for n in range(10)]))
            fetch = Fetch(0, None, frozenset({"a/"}), 5, ("a/",))
            fetched = store.apply(Work(fetch=fetch)).fetched
            assert fetched is not None
            assert (fetched.messages, fetched.end) == ([], True)
            (lane,) = fetched.lanes
            assert ([message.id for message in lane.messages], lane.complete) == ([1, 3, 5], True)

    def test_single_channel_with_many_messages_is_read_in_parts(self, path: Path) -> None:
        with opened(path) as store:
            write(store, *[b"x" * 60_000] * 40)
            fetched = store.apply(Work(fetch=Fetch(0, None, frozenset(), 99, ("a/",)))).fetched
            assert fetched is not None
            (lane,) = fetched.lanes
            assert not lane.complete
            assert [message.id for message in lane.messages] == list(range(1, 19))


def test_failure_within_a_transaction_stores_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with opened(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store_module._Tally, "finish", fail)
            assert isinstance(write(store, b"1").errors[0], OutboxError)
        assert payloads(store) == []
        assert store.figures.waiting == 0


class TestFullDisk:
    def test_nothing_is_corrupted_and_changes_are_recorded(self, path: Path) -> None:
        with opened(path) as store:
            write(store, *[b"x" * 1000] * 20)
            limit_pages(store)
            messages = read(store)
            work = Work(
                [record(b"y" * 60_000)], {m.id: (m, "accepted") for m in messages[:10]}, EVERYTHING
            )
            outcome = store.apply(work)
            assert "full" in str(outcome.errors[0])
            assert isinstance(outcome.errors[0], OutboxError)
            assert outcome.write_error is None
            assert outcome.fetched is not None
            assert outcome.fetched.messages == messages[10:]
            assert store.figures.waiting == 10
            # The space of the accepted messages is used again.
            assert write(store, b"y" * 2000).errors == [None]

    def test_changes_that_cannot_be_recorded_are_not_read_again(self, path: Path) -> None:
        with opened(path) as store:
            write(store, b"1", b"2", b"3")
            first, second, third = read(store)
            with read_only(store):
                fetch = EVERYTHING._replace(lanes=("a/",))
                work = Work([record()], {first.id: (first, "accepted")}, fetch)
                outcome = store.apply(work)
                assert isinstance(outcome.write_error, OutboxError)
                assert isinstance(outcome.errors[0], OutboxError)
                assert outcome.fetched is not None
                assert outcome.fetched.messages == [second, third]
                assert outcome.fetched.lanes[0].messages == [second, third]
                with pytest.raises(OutboxError, match="cannot write"):
                    store.retry(None)
            assert payloads(store) == [b"1", b"2", b"3"]

    def test_file_size_limit_is_reported_and_loses_no_message(self, path: Path) -> None:
        """The operating system refuses writes, as it does when a disk is full."""
        program = f"""
import resource
from tests.outbox.test_store import *

path = Path({str(path)!r})
with opened(path) as store:
    write(store, b"before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    failed = [write(store, b"x" * 50_000).errors[0] for _ in range(10)]
    print(sum(error is None for error in failed) + 1, failed[-1])
    messages = read(store)
    print(len(messages))
    print(change(store, messages[0], "accepted").write_error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(change(store, messages[0], "accepted").write_error)
    print(write(store, b"after").errors)
"""
        output = run_program(program).splitlines()
        stored, error = output[0].split(maxsplit=1)
        assert "cannot write the outbox" in error
        assert output[1] == stored
        assert output[3:] == ["None", "[None]"]
        with opened(path) as store:
            assert len(read(store)) == int(stored)
            assert payloads(store)[-1] == b"after"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no users to change to")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_read_only_file_or_directory_is_rejected(what: str) -> None:
    # Not in pytest's directory, which the other user may not enter.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "out.db")
        with opened(path) as store:
            write(store, b"1")
        os.chmod(directory, 0o777 if what == "file" else 0o555)
        os.chmod(path, 0o444 if what == "file" else 0o666)
        assert "OutboxError: cannot open the outbox" in open_elsewhere(path, unprivileged=True)
        os.chmod(directory, 0o700)
        os.chmod(path, 0o600)
        assert os.listdir(directory) == ["out.db"]
        with opened(path) as store:
            assert payloads(store) == [b"1"]


def limit_pages(store: Store) -> None:
    """Let the file not grow any more."""
    database: sqlite3.Connection = store._open_database()
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")


@contextmanager
def read_only(store: Store) -> Iterator[None]:
    """Let every write fail."""
    database: sqlite3.Connection = store._open_database()
    database.execute("PRAGMA query_only = 1")
    try:
        yield
    finally:
        database.execute("PRAGMA query_only = 0")


def open_elsewhere(path: Path, *, unprivileged: bool = False) -> str:
    """Open the file in another process, and return what it prints."""
    become = "import os; os.getuid() or os.setuid(65534)" if unprivileged else ""
    return run_program(f"""
from emitter_anyio.outbox import OutboxError
from emitter_anyio.outbox._store import Store
{become}
store = Store({str(path)!r}, 10**6, 10**6, "raise")
try:
    print(store.open())
except OutboxError as exc:
    print(f"{{type(exc).__name__}}: {{exc}}")
store.close()
""")


def run_program(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent.parent,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout
