"""The file of an outbox, an SQLite database. All of this blocks, and runs in a worker thread."""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Container, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from threading import Lock
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ._clock import Clock, Readings
from ._schedule import Fetch, Fetched, Lane
from ._values import (
    WEIGHT_OVERHEAD_BYTES,
    OutboxError,
    OutboxFullError,
    OutboxInUseError,
    ParkedMessage,
    Record,
    Stored,
)

Overflow: TypeAlias = Literal["raise", "drop_oldest"]

_APPLICATION_ID: Final = 0x456D4F62
"""The bytes ``EmOb`` in the header of the file, which identify it."""
_VERSION: Final = 1
"""The version of the tables below, in the header of the file."""

_SCHEMA: Final = (
    # AUTOINCREMENT never reuses the id of a deleted message.
    """CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        channel TEXT NOT NULL,
        payload BLOB NOT NULL,
        ttl INTEGER,
        retain INTEGER NOT NULL,
        echo INTEGER NOT NULL,
        published REAL NOT NULL
    )""",
    "CREATE INDEX messages_by_channel ON messages (channel)",
    """CREATE TABLE parked (
        id INTEGER PRIMARY KEY,
        channel TEXT NOT NULL,
        payload BLOB NOT NULL,
        ttl INTEGER,
        retain INTEGER NOT NULL,
        echo INTEGER NOT NULL,
        published REAL NOT NULL,
        reason TEXT NOT NULL,
        status INTEGER
    )""",
    "CREATE TABLE state (time REAL NOT NULL, wall REAL NOT NULL, given_up INTEGER NOT NULL)",
    "INSERT INTO state VALUES (0, 0, 0)",
)

_COLUMNS: Final = "id, channel, payload, ttl, retain, echo, published"
_TABLES: Final = ("messages", "parked")
_SIDE_FILES: Final = ("-wal", "-shm", "-journal")

_CORRUPT: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_IN_USE: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

_FETCHED_MESSAGES: Final = 1000
_FETCHED_BYTES: Final = 1024 * 1024
_WAL_BYTES: Final = 8 * 1024 * 1024
"""The size to which the write-ahead log is truncated after it was larger."""
_CLOCK_SECONDS: Final = 10.0
"""The interval at which the time is written to the file."""
_SWEEP_SECONDS: Final = 60.0
"""The interval at which messages are given up by age, and by ttl if space is needed."""

# Of the steady clocks, only Linux's counts the time for which the machine is suspended.
if sys.platform == "linux":
    _steady = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
else:  # pragma: no cover - not on Linux
    _steady = time.monotonic


class Parking(NamedTuple):
    """The refusal of a message: its text and its status."""

    reason: str
    status: int | None


Reason: TypeAlias = Literal["too old", "ttl has passed", "no space"]
"""Why a message is given up."""

Change: TypeAlias = Literal["accepted"] | Reason | Parking
"""The outcome of a message."""


@dataclass(frozen=True, slots=True)
class Work:
    """
    What to do in one transaction, and what to read after it.

    :ivar records: messages to store
    :ivar changes: the outcomes of stored messages
    :ivar fetch: what to read
    """

    records: list[Record] = field(default_factory=list)
    changes: dict[int, tuple[Stored, Change]] = field(default_factory=dict)
    fetch: Fetch | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """
    The figures of the file.

    :ivar oldest: when the oldest waiting message was published, by the clock of the outbox
    """

    waiting: int = 0
    parked: int = 0
    size: int = 0
    given_up: int = 0
    oldest: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    The result of :class:`Work`.

    :ivar errors: for each record the error, or ``None`` if it is on disk
    :ivar write_error: why the changes are not recorded, or ``None``
    :ivar parked: the messages that were parked
    :ivar given_up: the number of messages that were given up, by reason
    :ivar fetched: the messages that were read, or ``None``
    :ivar read_error: why no messages were read, or ``None``
    """

    errors: list[OutboxError | None]
    write_error: OutboxError | None = None
    parked: list[ParkedMessage] = field(default_factory=list)
    given_up: Mapping[Reason, int] = field(default_factory=dict)
    fetched: Fetched | None = None
    read_error: OutboxError | None = None


class _CorruptError(Exception):
    """The file is not a database, or a damaged database."""


class Store:
    """
    The messages of an outbox on disk.

    Each write is on disk when the method returns: the write-ahead log is synchronized. The file is
    locked while it is open. Any thread can call the methods, because a lock serializes them.

    :param path: the path of the file, relative to the working directory when it is opened
    :param max_size: the maximum weight of all messages
    :param max_age: the age in seconds at which messages are given up
    :param overflow: the policy if there is no space for a message
    """

    def __init__(self, path: str, max_size: int, max_age: float, overflow: Overflow) -> None:
        self._path = path
        self._max_size = max_size
        self._max_age = max_age
        self._overflow: Overflow = overflow
        self._lock = Lock()
        self._database: sqlite3.Connection | None = None
        self._closed = False
        """Whether the file was closed, perhaps before a thread has opened it."""
        self._clock = Clock(0, 0, readings())
        self._saved = 0.0
        """The time that is written in the file."""
        self._swept = 0.0
        """The time at which messages were last given up because of their ttl, to gain space."""
        self.figures = Figures()

    def __repr__(self) -> str:
        return f"<Store {self._path!r}>"

    def now(self) -> float:
        """Return the time by the clock of the outbox."""
        return self._clock.time(_steady())

    # Opening and closing

    def open(self) -> str | None:
        """
        Open the file, or create it. A corrupt file is set aside, and a new one is created.

        :return: the path to which a corrupt file was set aside, or ``None``
        :raises OutboxInUseError: if the file is in use
        :raises OutboxError: if it cannot be opened, read or written
        """
        with self._lock:
            if self._closed:
                raise OutboxError(f"cannot open the outbox {self._path!r}: it was closed")
            aside = None
            self._path = os.path.abspath(self._path)
            try:
                identity = _create(self._path)
                try:
                    self._database = self._connect()
                except _CorruptError:
                    aside = _set_aside(self._path, identity)
                    _create(self._path)
                    self._database = self._connect()
                _sync_directory(self._path)
            except (OSError, sqlite3.Error, _CorruptError) as exc:
                self._close()
                raise self._error("open", exc) from exc
            return aside

    def close(self) -> None:
        """Close the file, if it is open, and do not open it any more."""
        with self._lock:
            self._closed = True
            if self._database is not None:
                # If this fails, the clock is only less exact: everything else is on disk.
                with suppress(sqlite3.Error), self._transaction() as database:
                    self._save_clock(database, self.now())
            self._close()

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _connect(self) -> sqlite3.Connection:
        if not os.path.getsize(self._path) and _size(f"{self._path}-wal"):
            # SQLite would delete the log, which might contain messages.
            raise _CorruptError("the file is empty, but its log is not")
        database = sqlite3.connect(
            self._path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(database)
        except BaseException as exc:
            database.close()
            if isinstance(exc, sqlite3.DatabaseError) and _code(exc) in _CORRUPT:
                raise _CorruptError(str(exc)) from exc
            raise
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        # The lock is taken by the first access, and kept until the file is closed.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        (application,) = _one(database, "PRAGMA application_id")
        (version,) = _one(database, "PRAGMA user_version")
        (tables,) = _one(database, "SELECT count(*) FROM sqlite_master")
        database.execute("ROLLBACK")
        if application != _APPLICATION_ID and tables:
            raise OutboxError(
                f"cannot open the outbox {self._path!r}: the file is a database of another "
                "program; use another path"
            )
        if tables and version != _VERSION:
            raise OutboxError(
                f"cannot open the outbox {self._path!r}: its format is version {version}, but this "
                f"release of emitter_anyio supports version {_VERSION}; upgrade emitter_anyio"
            )
        # On macOS, only this makes the drive write its cache.
        database.execute("PRAGMA fullfsync = 1")
        database.execute("PRAGMA checkpoint_fullfsync = 1")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        if tables:
            (answer,) = _one(database, "PRAGMA quick_check(1)")
            if answer != "ok":
                raise _CorruptError(answer)
        database.execute("BEGIN IMMEDIATE")
        if not tables:
            for statement in _SCHEMA:
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {_VERSION}")
        try:
            self._read_state(database)
        except sqlite3.OperationalError as exc:
            if _code(exc) == sqlite3.SQLITE_ERROR:
                raise _CorruptError(str(exc)) from exc  # a table or a column is missing
            raise
        database.execute("COMMIT")

    def _read_state(self, database: sqlite3.Connection) -> None:
        """Read the figures, and write the time, which fails if the file is read-only."""
        now = readings()
        saved, wall, given_up = _one(database, "SELECT time, wall, given_up FROM state")
        latest = [saved]
        counts = []
        for table in _TABLES:
            count, size, last = _one(
                database,
                f"SELECT count(*), total(length(channel) + length(payload)), max(published) "
                f"FROM {table}",
            )
            counts.append((count, int(size) + count * WEIGHT_OVERHEAD_BYTES))
            latest.append(last or 0)
        (waiting, waiting_size), (parked, parked_size) = counts
        # Messages might have been stored after the time was last written.
        self._clock = Clock(max(latest), wall, now)
        size = waiting_size + parked_size
        self.figures = Figures(waiting, parked, size, given_up, _oldest(database))
        self._swept = self._clock.time(now.steady)
        self._save_clock(database, self._swept)

    def _save_clock(self, database: sqlite3.Connection, now: float) -> None:
        database.execute("UPDATE state SET time = ?, wall = ?", (now, time.time()))
        self._saved = now

    # Working

    def apply(self, work: Work) -> Outcome:
        """
        Store messages, record what became of others, and read further ones.

        If the messages cannot be stored, for example because the disk is full, the changes are
        still recorded if possible, and messages are read in any case.
        """
        with self._lock:
            outcome = self._write_what_is_possible(work)
            if work.fetch is None:
                return outcome
            unrecorded = () if outcome.write_error is None else work.changes
            try:
                fetched = _fetch(self._open_database(), work.fetch, unrecorded)
            except sqlite3.Error as exc:
                return replace(outcome, read_error=self._error("read", exc))
            return replace(outcome, fetched=fetched)

    def _write_what_is_possible(self, work: Work) -> Outcome:
        try:
            return self._write(work.records, work.changes)
        except sqlite3.Error as exc:
            error = self._error("write", exc)
        errors: list[OutboxError | None] = [error] * len(work.records)
        if work.records and work.changes:
            with suppress(sqlite3.Error):
                return replace(self._write([], work.changes), errors=errors)
        return Outcome(errors, error)

    def parked(self) -> list[ParkedMessage]:
        """
        Return the parked messages, oldest first.

        :raises OutboxError: if the file cannot be read
        """
        with self._lock:
            try:
                return list(_parked(self._open_database(), self.now()))
            except sqlite3.Error as exc:
                raise self._error("read", exc) from exc

    def retry(self, ids: Iterable[int] | None) -> int:
        """
        Put parked messages after the waiting ones; return their number.

        :param ids: the ids of the messages; ``None`` for all
        :raises OutboxError: if the file cannot be written
        """
        return self._move(ids, retry=True)

    def drop(self, ids: Iterable[int]) -> int:
        """
        Delete parked messages; return their number.

        :raises OutboxError: if the file cannot be written
        """
        return self._move(ids, retry=False)

    def _move(self, ids: Iterable[int] | None, *, retry: bool) -> int:
        with self._lock:
            moved = size = 0
            try:
                with self._transaction() as database:
                    if ids is None:
                        ids = [row[0] for row in database.execute("SELECT id FROM parked")]
                    for id in sorted(set(ids)):
                        weight = _weight(database, "parked", id)
                        if weight is None:
                            continue
                        if retry:
                            database.execute(
                                "INSERT INTO messages (channel, payload, ttl, retain, echo, "
                                "published) SELECT channel, payload, ttl, retain, echo, published "
                                "FROM parked WHERE id = ?",
                                (id,),
                            )
                        database.execute("DELETE FROM parked WHERE id = ?", (id,))
                        moved += 1
                        size += weight
                    oldest = _oldest(database)
            except sqlite3.Error as exc:
                raise self._error("write", exc) from exc
            figures = self.figures
            self.figures = replace(
                figures,
                waiting=figures.waiting + (moved if retry else 0),
                parked=figures.parked - moved,
                size=figures.size - (0 if retry else size),
                oldest=oldest,
            )
            return moved

    def _write(
        self, records: list[Record], changes: Mapping[int, tuple[Stored, Change]]
    ) -> Outcome:
        with self._transaction() as database:
            tally = _Tally(database, self.figures, self.now())
            for message, change in changes.values():
                if isinstance(change, Parking):
                    tally.park(message, change)
                else:
                    tally.delete("messages", message.id, change)
            tally.expire(self._max_age)
            errors = [self._store(tally, record) for record in records]
            if tally.now - self._saved >= _CLOCK_SECONDS:
                self._save_clock(database, tally.now)
            figures = tally.finish()
        self.figures = figures
        return Outcome(errors, None, tally.newly_parked, tally.given_up)

    def _store(self, tally: _Tally, record: Record) -> OutboxError | None:
        if self._make_space(tally, record.weight):
            tally.store(record)
            return None
        return OutboxFullError(
            f"the outbox {self._path!r} is full: {tally.size} of {self._max_size} bytes are in "
            "use; publish later, or increase max_size"
        )

    def _make_space(self, tally: _Tally, weight: int) -> bool:
        """Return whether there is space for a message, and give up others if that is necessary."""
        if tally.size + weight > self._max_size and tally.now - self._swept >= _SWEEP_SECONDS:
            self._swept = tally.now
            tally.expire_by_ttl()
        if self._overflow == "drop_oldest" and weight <= self._max_size:
            while tally.size + weight > self._max_size:
                tally.drop_oldest()
        return tally.size + weight <= self._max_size

    def _open_database(self) -> sqlite3.Connection:
        if self._database is None:
            raise sqlite3.ProgrammingError("the file is closed")
        return self._database

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        database = self._open_database()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back itself after some errors, such as a full disk.
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _error(self, verb: str, exc: Exception) -> OutboxError:
        where = f"cannot {verb} the outbox {self._path!r}"
        code = _code(exc)
        if code in _IN_USE:
            return OutboxInUseError(
                f"{where}: another process or another Outbox is using it; use a separate path for "
                "each"
            )
        if code == sqlite3.SQLITE_READONLY:
            error = OutboxError(f"{where}: the file or its directory is read-only")
        elif isinstance(exc, FileNotFoundError):
            error = OutboxError(f"{where}: its directory does not exist")
        elif isinstance(exc, OSError):
            error = OutboxError(f"{where}: {exc.strerror}")
        else:
            error = OutboxError(f"{where}: {exc}")
        error.__cause__ = exc
        return error


class _Tally:
    """The changes of a transaction, and the resulting figures."""

    def __init__(self, database: sqlite3.Connection, figures: Figures, now: float) -> None:
        self._database = database
        self._figures = figures
        self._waiting = figures.waiting
        self._parked = figures.parked
        self.size = figures.size
        self.now = now
        self.newly_parked: list[ParkedMessage] = []
        self.given_up: dict[Reason, int] = {}

    def store(self, record: Record) -> None:
        """Store a message."""
        self._database.execute(
            "INSERT INTO messages (channel, payload, ttl, retain, echo, published) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (*record, self.now),
        )
        self._waiting += 1
        self.size += record.weight

    def delete(self, table: str, id: int, why: Literal["accepted"] | Reason) -> None:
        """Delete a message, which might have been deleted already."""
        weight = _weight(self._database, table, id)
        if weight is None:
            return
        self._database.execute(f"DELETE FROM {table} WHERE id = ?", (id,))
        self.size -= weight
        if table == "parked":
            self._parked -= 1
        else:
            self._waiting -= 1
        if why != "accepted":
            self.given_up[why] = self.given_up.get(why, 0) + 1

    def park(self, message: Stored, parking: Parking) -> None:
        """Park a message, unless it was given up before."""
        changed = self._database.execute(
            f"INSERT INTO parked SELECT {_COLUMNS}, ?, ? FROM messages WHERE id = ?",
            (*parking, message.id),
        )
        if changed.rowcount:
            self._database.execute("DELETE FROM messages WHERE id = ?", (message.id,))
            self._waiting -= 1
            self._parked += 1
            age = max(0.0, self.now - message.published)
            self.newly_parked.append(
                ParkedMessage(message.id, message.channel, message.payload, age, *parking)
            )

    def expire(self, max_age: float) -> None:
        """Give up the messages that are too old."""
        for table in _TABLES:
            while (first := self._first(table)) is not None:
                id, published = first
                if self.now - published < max_age:
                    break
                self.delete(table, id, "too old")

    def expire_by_ttl(self) -> None:
        """Give up all messages whose ttl has passed."""
        for table in _TABLES:
            found = self._database.execute(
                f"SELECT id FROM {table} WHERE ttl IS NOT NULL AND published + ttl <= ?",
                (self.now,),
            ).fetchall()
            for (id,) in found:
                self.delete(table, id, "ttl has passed")

    def drop_oldest(self) -> None:
        """Give up the oldest message."""
        firsts = ((self._first(table), table) for table in _TABLES)
        id, table = min((first[0], table) for first, table in firsts if first is not None)
        self.delete(table, id, "no space")

    def finish(self) -> Figures:
        """Write the number of messages that were given up, and return the new figures."""
        given_up = sum(self.given_up.values())
        if given_up:
            self._database.execute("UPDATE state SET given_up = given_up + ?", (given_up,))
        return Figures(
            self._waiting,
            self._parked,
            self.size,
            self._figures.given_up + given_up,
            _oldest(self._database),
        )

    def _first(self, table: str) -> tuple[int, float] | None:
        first: tuple[int, float] | None = self._database.execute(
            f"SELECT id, published FROM {table} ORDER BY id LIMIT 1"
        ).fetchone()
        return first


def readings() -> Readings:
    """Read the clocks of the system."""
    return Readings(time.time(), _steady())


def _create(path: str) -> tuple[int, int]:
    """
    Create the file if it does not exist, so that only its owner can read it.

    :return: the device and the inode of the file
    """
    # Do not open a file that exists: closing it again would end the locks of this process on it.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _set_aside(path: str, identity: tuple[int, int]) -> str:
    """
    Rename a corrupt file and its side files to a name that is not in use; return the new path.

    :param identity: the device and the inode of the corrupt file
    :raises OSError: if it is not the same file any more, because another process has replaced it
    """
    made = f"{path}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    aside, number = made, 1
    while any(os.path.lexists(aside + suffix) for suffix in ("", *_SIDE_FILES)):
        number += 1
        aside = f"{made}-{number}"
    if _create(path) != identity:
        raise OSError(errno.EBUSY, "another process has replaced the corrupt file; try again")
    for suffix in (*_SIDE_FILES, ""):
        if os.path.lexists(path + suffix):
            os.rename(path + suffix, aside + suffix)
    return aside


def _sync_directory(path: str) -> None:
    """Make the name of a new file permanent. SQLite does this only for its log."""
    flags: int | None = getattr(os, "O_DIRECTORY", None)
    if flags is None:  # Windows cannot open directories
        return
    directory = os.open(os.path.dirname(path), os.O_RDONLY | flags)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _fetch(database: sqlite3.Connection, fetch: Fetch, unrecorded: Container[int]) -> Fetched:
    """Read messages, except those that are on disk only because deleting them failed."""
    messages: list[Stored] = []
    last, end = fetch.until, fetch.after is None
    if fetch.after is not None:
        last, end = fetch.after, True
        room = _FETCHED_BYTES
        rows = database.execute(
            f"SELECT {_COLUMNS} FROM messages WHERE id > ? ORDER BY id LIMIT ?",
            (last, _FETCHED_MESSAGES),
        )
        with closing(rows):
            for number, message in enumerate(map(_stored, rows), 1):
                last = message.id
                if message.channel not in fetch.without and last not in unrecorded:
                    messages.append(message)
                room -= len(message.payload)
                if number == _FETCHED_MESSAGES or room <= 0:
                    end = False
                    break
    lanes = [_fetch_lane(database, channel, last, unrecorded) for channel in fetch.lanes]
    return Fetched(messages, last, end, lanes)


def _fetch_lane(
    database: sqlite3.Connection, channel: str, last: int, unrecorded: Container[int]
) -> Lane:
    messages: list[Stored] = []
    room = _FETCHED_BYTES
    rows = database.execute(
        f"SELECT {_COLUMNS} FROM messages WHERE channel = ? AND id <= ? ORDER BY id",
        (channel, last),
    )
    with closing(rows):
        for message in map(_stored, rows):
            if message.id in unrecorded:
                continue
            if len(messages) == _FETCHED_MESSAGES or (messages and room <= 0):
                return Lane(channel, messages, complete=False)
            messages.append(message)
            room -= len(message.payload)
    return Lane(channel, messages, complete=True)


def _stored(row: tuple[Any, ...]) -> Stored:
    id, channel, payload, ttl, retain, echo, published = row
    return Stored(id, channel, payload, ttl, bool(retain), bool(echo), published)


def _parked(database: sqlite3.Connection, now: float) -> Iterator[ParkedMessage]:
    rows = database.execute(
        "SELECT id, channel, payload, published, reason, status FROM parked ORDER BY id"
    )
    for id, channel, payload, published, reason, status in rows:
        yield ParkedMessage(id, channel, payload, max(0.0, now - published), reason, status)


def _oldest(database: sqlite3.Connection) -> float | None:
    found = database.execute("SELECT published FROM messages ORDER BY id LIMIT 1").fetchone()
    return None if found is None else found[0]


def _weight(database: sqlite3.Connection, table: str, id: int) -> int | None:
    found = database.execute(
        f"SELECT length(channel) + length(payload) FROM {table} WHERE id = ?", (id,)
    ).fetchone()
    return None if found is None else found[0] + WEIGHT_OVERHEAD_BYTES


def _one(database: sqlite3.Connection, query: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = database.execute(query).fetchone()
    if row is None:
        raise _CorruptError(f"no result of {query}")
    return row


def _code(exc: BaseException) -> int | None:
    """Return SQLite's primary result code of an exception, if it has one."""
    code: int | None = getattr(exc, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
