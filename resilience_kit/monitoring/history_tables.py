"""Where a history is kept: a table of packed samples, in a file of SQLite or any database that SQLAlchemy knows."""

import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.measures import MOST_BYTES, Sample, packed

# Seconds that a row stands for, and for how many seconds back such rows are kept: an hour, a week, a year.
KEPT: Mapping[int, int] = {1: 3_600, 60: 7 * 86_400, 3_600: 366 * 86_400}
# As many as 32 processes write, of each resolution: programs that start anew all the time must not fill the disk.
_MOST_ROWS: Mapping[int, int] = {resolution: 32 * kept // resolution for resolution, kept in KEPT.items()}
# Seconds that a writer waits for another process's writing, and a reader for the file.
_PATIENCE = 1.0

_NAME = "resilience_samples"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What a row is about: the seconds that it stands for, when they began since the epoch, and whose they are."""

    resolution: int
    start: int
    process: str


class Table(Protocol):
    """Where samples lie by their keys. What goes wrong is an error of the database's own, of `errors`."""

    place: str
    errors: tuple[type[Exception], ...]

    def write(self, rows: Mapping[Key, Sample]) -> None:
        """Put samples under their keys, in place of what is there, all or none."""

    def prune(self, now: float) -> None:
        """Delete what is too old, and of the rest the oldest where it is too much."""

    def read(self, resolution: int, start: float, end: float) -> list[bytes]:
        """The packed samples of a stretch of time, the oldest first."""
        ...

    def get(self, key: Key) -> bytes | None:
        """One packed sample; None if there is none."""
        ...

    def close(self) -> None:
        """Close what the writer has open."""

    def leave_parent(self) -> None:
        """In a forked child: leave what the parent has open to it, and open it anew."""


# What children of a fork must not close: SQLite would clean up after a writer that is at work.
_of_parents: list[Any] = []


class SqliteTable:
    """A file of SQLite, with a write-ahead log: who is killed leaves what was committed, and whole."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).expanduser().absolute()
        self.place = str(path)
        self._writer: sqlite3.Connection | None = None

    def write(self, rows: Mapping[Key, Sample]) -> None:
        """Put samples under their keys, in one transaction."""
        writer = self._open()
        values = [(key.resolution, key.start, key.process, packed(sample)) for key, sample in rows.items()]
        with writer:
            writer.executemany(f"INSERT OR REPLACE INTO {_NAME} VALUES (?, ?, ?, ?)", values)  # noqa: S608 - a constant

    def prune(self, now: float) -> None:
        """Delete what is too old, and of the rest the oldest where it is too much."""
        if not self._path.exists():
            # somebody deleted it: what is open is a file without a name
            self.close()
        writer = self._open()
        for resolution, kept in KEPT.items():
            newest_to_go = f"SELECT start FROM {_NAME} WHERE resolution = ? ORDER BY start DESC LIMIT 1 OFFSET ?"  # noqa: S608 - a constant
            row = writer.execute(newest_to_go, (resolution, _MOST_ROWS[resolution])).fetchone()
            before = max(now - kept, -1 if row is None else row[0] + 1)
            with writer:
                writer.execute(f"DELETE FROM {_NAME} WHERE resolution = ? AND start < ?", (resolution, before))  # noqa: S608 - a constant

    def read(self, resolution: int, start: float, end: float) -> list[bytes]:
        """The packed samples of a stretch of time, the oldest first; from any thread."""
        query = f"SELECT data FROM {_NAME} WHERE resolution = ? AND start >= ? AND start < ? ORDER BY start, process"  # noqa: S608 - a constant
        return [data for (data,) in self._ask(query, (resolution, start, end))]

    def get(self, key: Key) -> bytes | None:
        """One packed sample; None if there is none."""
        query = f"SELECT data FROM {_NAME} WHERE resolution = ? AND start = ? AND process = ?"  # noqa: S608 - a constant
        row = self._open().execute(query, (key.resolution, key.start, key.process)).fetchone()
        return None if row is None else row[0]

    def close(self) -> None:
        """Close what the writer has open."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def leave_parent(self) -> None:
        """In a forked child: leave what the parent has open to it, and open it anew."""
        _of_parents.append(self._writer)
        self._writer = None

    def _open(self) -> sqlite3.Connection:
        if self._writer is None:
            # closed by another thread at the end, when this one has ended
            writer = sqlite3.connect(self._path, timeout=_PATIENCE, check_same_thread=False)
            try:
                writer.execute("PRAGMA journal_mode = WAL")
                # what was committed outlives the process, and the file stays whole when the machine stops
                writer.execute("PRAGMA synchronous = NORMAL")
                with writer:
                    writer.execute(
                        f"CREATE TABLE IF NOT EXISTS {_NAME} (resolution INTEGER NOT NULL, start INTEGER NOT NULL, "
                        "process TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (resolution, start, process))"
                    )
            except BaseException:
                writer.close()
                raise
            self._writer = writer
        return self._writer

    def _ask(self, query: str, values: tuple[Any, ...]) -> Iterable[Any]:
        if not self._path.exists():
            raise FileNotFoundError
        # not as a new file, should it go now
        with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=rw", timeout=_PATIENCE, uri=True)) as reader:
            return reader.execute(query, values).fetchall()


class SqlAlchemyTable:
    """A table of any database that SQLAlchemy knows."""

    def __init__(self, url: str) -> None:
        try:
            self._sql = sql = import_module("sqlalchemy")
        except ImportError as error:
            raise ImportError("a history at a URL needs SQLAlchemy: pip install 'resilience-kit[history]'") from error
        self.errors: tuple[type[Exception], ...] = (sql.exc.SQLAlchemyError, OSError)
        problem = None
        try:
            self._url = sql.make_url(url)
            self._engine = sql.create_engine(self._url, pool_pre_ping=True)
        except sql.exc.SQLAlchemyError as error:
            problem = type(error).__name__
        if problem is not None:
            # the error may quote the URL, and that its password
            raise ConfigurationError(f"History() was given a URL that SQLAlchemy cannot use: {problem}")
        self.place = self._url.render_as_string(hide_password=True)
        self._is_made = False
        self._table = sql.Table(
            _NAME,
            sql.MetaData(),
            sql.Column("resolution", sql.Integer, primary_key=True, autoincrement=False),
            sql.Column("start", sql.BigInteger, primary_key=True, autoincrement=False),
            sql.Column("process", sql.String(255), primary_key=True),
            # without a length, MySQL has room for 64 KB
            sql.Column("data", sql.LargeBinary(MOST_BYTES - 1), nullable=False),
        )

    def write(self, rows: Mapping[Key, Sample]) -> None:
        """Put samples under their keys, in one transaction."""
        self._make()
        sql, table = self._sql, self._table
        values = [
            {"resolution": key.resolution, "start": key.start, "process": key.process, "data": packed(sample)}
            for key, sample in rows.items()
        ]
        with self._engine.begin() as connection:
            # no two databases replace a row in the same words
            for key in rows:
                connection.execute(sql.delete(table).where(*self._is(key)))
            connection.execute(sql.insert(table), values)

    def prune(self, now: float) -> None:
        """Delete what is too old, and of the rest the oldest where it is too much."""
        self._make()
        sql, columns = self._sql, self._table.c
        with self._engine.begin() as connection:
            for resolution, kept in KEPT.items():
                of_resolution = columns.resolution == resolution
                newest_to_go = (
                    sql.select(columns.start)
                    .where(of_resolution)
                    .order_by(columns.start.desc())
                    .limit(1)
                    .offset(_MOST_ROWS[resolution])
                )
                start = connection.execute(newest_to_go).scalar()
                before = max(int(now) - kept, -1 if start is None else start + 1)
                connection.execute(sql.delete(self._table).where(of_resolution, columns.start < before))

    def read(self, resolution: int, start: float, end: float) -> list[bytes]:
        """The packed samples of a stretch of time, the oldest first; from any thread."""
        columns = self._table.c
        query = (
            self._sql.select(columns.data)
            .where(columns.resolution == resolution, columns.start >= start, columns.start < end)
            .order_by(columns.start, columns.process)
        )
        with self._engine.connect() as connection:
            return [*connection.execute(query).scalars()]

    def get(self, key: Key) -> bytes | None:
        """One packed sample; None if there is none."""
        self._make()
        with self._engine.connect() as connection:
            data: bytes | None = connection.execute(
                self._sql.select(self._table.c.data).where(*self._is(key))
            ).scalar_one_or_none()
            return data

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def leave_parent(self) -> None:
        """In a forked child: leave what the parent has open to it, and open it anew."""
        self._engine.dispose(close=False)

    def _is(self, key: Key) -> tuple[Any, ...]:
        columns = self._table.c
        return columns.resolution == key.resolution, columns.start == key.start, columns.process == key.process

    def _make(self) -> None:
        if not self._is_made:
            self._table.metadata.create_all(self._engine)
            self._is_made = True
