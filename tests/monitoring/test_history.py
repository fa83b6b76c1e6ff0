"""The history on disk: what is written is whole, what is old goes, and what cannot be written harms nobody."""

import asyncio
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from resilience_kit import ConfigurationError
from resilience_kit.monitoring import History, history as history_module, history_tables
from resilience_kit.monitoring.history_tables import Key
from resilience_kit.monitoring.measures import Reading, Sample, merge, merge_by

NOON = 1_700_000_000 // 86_400 * 86_400 + 12 * 3_600
RECORDER = Path(__file__).parent / "recorder.py"


def sample(at, calls=1, process="one", seconds=1.0, **gauges):
    return Sample(at, seconds, process, (Reading("models", "A", {"calls": calls}, gauges),))


def calls_of(samples):
    return [it.reading("models", "A").counter("calls") for it in samples]


@pytest.fixture
def place(tmp_path):
    return tmp_path / "history.sqlite3"


@pytest.fixture(params=["sqlite3", "SQLAlchemy"])
def make(request, place):
    """Make a history in a file of SQLite, by either way, at noon of some day."""
    histories = []

    def make(now=NOON):
        if request.param == "SQLAlchemy":
            pytest.importorskip("sqlalchemy")
        where = f"sqlite:///{place}" if request.param == "SQLAlchemy" else place
        histories.append(History(where, clock=lambda: now))
        return histories[-1]

    yield make
    for history in histories:
        history.close()
        history._table.close()


@pytest.fixture
def written(make):
    """Write samples, and tell the history that holds them."""

    def written(*samples, now=NOON):
        with make(now) as history:
            for it in samples:
                history.add(it)
        return history

    return written


# What is kept


def test_a_sample_is_read_as_it_was_added(written):
    given = sample(NOON, 3, state="OPEN", in_flight=2)
    assert written(given).read(NOON - 10) == [given]


def test_a_second_is_read_from_its_start_and_not_from_its_end(written):
    history = written(sample(NOON - 2), sample(NOON - 1), sample(NOON))
    assert [it.at for it in history.read(NOON - 2, NOON - 1)] == [NOON - 1]


@pytest.mark.parametrize(("resolution", "expected"), [(1, [1] * 70), (60, [60, 10]), (3_600, [70])])
def test_seconds_add_up_to_minutes_and_hours(written, resolution, expected):
    history = written(*(sample(NOON - 3_600 + second) for second in range(1, 71)))
    assert calls_of(history.read(NOON - 7_200, resolution=resolution)) == expected


def test_gauges_of_a_minute_are_those_of_its_last_second(written):
    history = written(*(sample(NOON - 60 + second, in_flight=second) for second in range(1, 61)))
    (minute,) = history.read(NOON - 60, resolution=60)
    assert minute.reading("models", "A").gauges == {"in_flight": 60}


def test_each_process_has_its_own_and_together_they_are_the_fleet(written):
    history = written(*(sample(NOON, calls, process) for calls, process in ((1, "one"), (2, "two"))))
    found = history.read(NOON - 60, resolution=60)
    assert [it.process for it in found] == ["one", "two"]
    assert calls_of(merge_by(found, 60)) == [3]


def test_two_samples_of_one_second_are_one_row(written):
    history = written(sample(NOON - 0.6, seconds=0.3), sample(NOON - 0.2, seconds=0.3))
    assert calls_of(history.read(NOON - 10)) == [2]


def test_a_minute_that_was_begun_before_a_restart_goes_on(make):
    for at in (NOON - 3, NOON - 2):
        with make() as history:
            history.add(sample(at))
    assert calls_of(history.read(NOON - 60, resolution=60)) == [2]


def test_a_sample_that_comes_late_goes_to_its_own_minute(written):
    history = written(*(sample(NOON - before) for before in (100, 99, 20, 98, 19, 21)))
    assert calls_of(history.read(NOON - 180, resolution=60)) == [3, 3]
    assert calls_of(history.read(NOON - 7_200, resolution=3_600)) == [6]


def test_two_histories_of_one_process_at_one_place_count_a_sample_once(make):
    one, two = make(), make()
    one.add(sample(NOON - 3))
    one.close()
    for at in (NOON - 2, NOON - 1):
        for history in (one, two):
            history.add(sample(at))
            history.close()
    assert calls_of(one.read(NOON - 60, resolution=60)) == [3]


def test_a_long_name_of_a_process_is_cut(written):
    assert written(sample(NOON, process="x" * 900)).read(NOON - 10)[0].process == "x" * 900


def test_a_sample_that_is_added_after_the_end_is_written_all_the_same(make):
    history = make()
    for at in (NOON - 2, NOON - 1):
        history.add(sample(at))
        history.close()
    assert len(history.read(NOON - 10)) == 2


def test_what_is_added_is_written_within_a_second_while_it_is_open(make):
    history = make()
    history.add(sample(NOON))
    found = []
    while not found:
        time.sleep(0.01)
        # else there is no file yet
        with suppress(ConfigurationError):
            found = history.read(NOON - 10)
    assert len(found) == 1


async def test_closing_in_an_event_loop_does_not_wait(make, monkeypatch):
    history = make()
    held = threading.Event()
    write = history._write
    monkeypatch.setattr(history, "_write", lambda samples: (held.wait(10), write(samples)))
    history.add(sample(NOON))
    history.close()
    thread = history._thread
    held.set()
    await asyncio.to_thread(thread.join)
    assert len(await asyncio.to_thread(history.read, NOON - 10)) == 1


# What is read


@pytest.mark.parametrize("resolution", [0, 2, 61, "1", None])
def test_another_resolution_is_refused(make, resolution):
    with pytest.raises(ConfigurationError, match=r"expected 1, 60 or 3600 seconds$"):
        make().read(0, resolution=resolution)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (NOON - 7_200, None, 120),
        (NOON - 3_600, None, 60),
        (NOON - 5_400, None, 90),
        (NOON - 600, None, 10),
        (NOON - 5_400, NOON - 1_800, 60),
        (NOON - 7_200, NOON - 3_600, 60),
        (NOON - 3_000, NOON - 2_400, 10),
    ],
)
def test_a_stretch_is_added_up_to_the_minute(written, start, end, expected):
    history = written(*(sample(NOON - 60 * minute, seconds=60) for minute in range(120)))
    assert calls_of([history.total(start, end)]) == [expected]


def test_where_there_are_no_minutes_any_more_an_hour_counts_by_its_middle(written):
    history = written(sample(NOON, seconds=3_600))
    for resolution in (1, 60):
        history._table.prune(NOON + history_tables.KEPT[resolution] + 3_600)
    assert calls_of([history.total(NOON - 2_000, NOON + 10)]) == [1]
    assert history.total(NOON - 1_000, NOON + 10) is None


def test_there_is_no_total_of_nothing(written):
    assert written(sample(NOON)).total(NOON + 10) is None


def test_another_thread_and_another_process_read_what_was_written(place):
    with History(place) as history:
        history.add(sample(time.time()))
    read = (
        "import sys; from resilience_kit.monitoring import History; "
        "print(len(History(sys.argv[1]).read(0)), len(History(sys.argv[1]).read(0, resolution=60)))"
    )
    finished = subprocess.run([sys.executable, "-c", read, place], capture_output=True, text=True, check=True)  # noqa: S603 - our own program
    assert finished.stdout.split() == ["1", "1"]


def test_what_was_not_yet_written_is_nothing_and_no_error(place, monkeypatch):
    with History(place) as history:
        held = threading.Event()
        write = history._write
        monkeypatch.setattr(history, "_write", lambda samples: (held.wait(10), write(samples)))
        history.add(sample(NOON))
        assert (history.read(0), history.total(0)) == ([], None)
        held.set()


def test_a_place_where_there_is_nothing_is_not_made_by_reading(place):
    with pytest.raises(ConfigurationError, match="there is no history to read at"):
        History(place).read(0)
    assert not place.exists()


def test_a_file_of_another_kind_is_refused_by_reading_and_left_alone(place, caplog):
    place.write_text("precious" * 1_000)
    with History(place) as history:
        history.add(sample(NOON))
    with pytest.raises(ConfigurationError, match="file is not a database"):
        history.read(0)
    assert place.read_text() == "precious" * 1_000
    assert len(caplog.messages) == 1


def test_rows_that_are_not_the_kits_are_left_out_and_named_once(make, place, caplog):
    with make() as history:
        history.add(sample(NOON))
    with closing(sqlite3.connect(place)) as connection, connection:
        for process, data in (("garbage", b"garbage"), ("text", "text"), ("number", 3)):
            connection.execute("INSERT INTO resilience_samples VALUES (1, ?, ?, ?)", (NOON - 2, process, data))
    for _ in range(2):
        assert calls_of(history.read(NOON - 10)) == [1]
    assert caplog.messages == [
        f"the history at {history.place!r} holds rows that are not the kit's, which were left out"
    ]


# How long it is kept


def count_rows(place):
    with closing(sqlite3.connect(place)) as connection:
        return dict(connection.execute("SELECT resolution, COUNT(*) FROM resilience_samples GROUP BY resolution"))


@pytest.mark.parametrize(("resolution", "kept"), [(1, 3_600), (60, 7 * 86_400), (3_600, 366 * 86_400)])
def test_what_is_too_old_goes(written, resolution, kept):
    old, young = NOON - kept - 3_601, NOON - 3
    history = written(sample(old), sample(young))
    assert [it.at for it in history.read(0, resolution=resolution)] == [young]


def test_rows_are_bounded_however_many_processes_start_anew(written, monkeypatch, place):
    monkeypatch.setattr(history_tables, "_MOST_ROWS", {1: 5, 60: 5, 3_600: 5})
    history = written(*(sample(NOON - before, process=str(before)) for before in range(50, 0, -1)))
    history._table.prune(NOON)
    assert all(count <= 5 for count in count_rows(place).values())
    assert [it.process for it in history.read(0)] == ["5", "4", "3", "2", "1"]


def test_a_file_stays_as_large_as_what_it_holds_at_most(place, monkeypatch):
    monkeypatch.setattr(history_tables, "KEPT", {1: 10, 60: 120, 3_600: 3_600})
    monkeypatch.setattr(history_module, "KEPT", {1: 10, 60: 120, 3_600: 3_600})
    now, sizes = [NOON], []
    with History(place, clock=lambda: now[0]) as history:
        for _ in range(20):
            for _ in range(30):
                now[0] += 1
                history._write([sample(now[0])])
            history._pruned_at = -1_000
            history._write([])
            history._table._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append(place.stat().st_size)
        # nothing was added, so no thread was started that would close it at its end
        history._table.close()
    assert max(sizes[10:]) <= max(sizes[:10])


def test_memory_is_bounded_with_many_processes(make, monkeypatch):
    monkeypatch.setattr(history_module, "_MOST_OPEN", 9)
    history = make()
    history._write([sample(NOON - 5, process=str(number)) for number in range(20)])
    assert len(history._open) <= 9
    history._write([sample(NOON - 4, process="0")])
    found = history.read(NOON - 60, resolution=60)
    assert {it.process: calls for it, calls in zip(found, calls_of(found), strict=True)}["0"] == 2


# What goes wrong


def unwritten(place, why):
    return (
        f"the history at {str(place)!r} cannot be written: OperationalError: {why}; the last ten minutes are kept "
        "until it can"
    )


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_file_that_is_locked_is_told_once_and_nothing_is_lost_meanwhile(place, caplog, monkeypatch):
    monkeypatch.setattr(history_tables, "_PATIENCE", 0.01)
    caplog.set_level(logging.INFO)
    history = History(place, clock=lambda: NOON)
    history._write([sample(NOON - 20)])
    with closing(sqlite3.connect(place, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for before in range(19, 9, -1):
            history._write([sample(NOON - before)])
        other.execute("COMMIT")
    for before in range(9, 0, -1):
        history._write([sample(NOON - before)])
    assert calls_of(history.read(NOON - 60, resolution=60)) == [20]
    assert len(history.read(NOON - 60)) == 20
    assert caplog.messages == [
        unwritten(place, "database is locked"),
        f"the history at {str(place)!r} is written again",
    ]
    history._table.close()


def test_a_restart_while_the_file_is_locked_loses_nothing_of_its_minute(place, monkeypatch):
    monkeypatch.setattr(history_tables, "_PATIENCE", 0.01)
    with History(place, clock=lambda: NOON) as before:
        before.add(sample(NOON - 20))
    history = History(place, clock=lambda: NOON)
    with closing(sqlite3.connect(place, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        history._write([sample(NOON - 10)])
        other.execute("COMMIT")
    history._write([sample(NOON - 9)])
    assert calls_of(history.read(NOON - 60, resolution=60)) == [3]
    history._table.close()


def test_a_disk_that_is_full_is_told_once_and_memory_stays_bounded(place, caplog, monkeypatch):
    monkeypatch.setattr(history_module, "_MOST_UNWRITTEN", 20)
    history = History(place, clock=lambda: NOON)
    history._write([sample(NOON - 1_000)])
    opened = history._table._open

    def full():
        # SQLite's own bound is told as a full disk is
        writer = opened()
        writer.execute("PRAGMA max_page_count = 1")
        return writer

    monkeypatch.setattr(history._table, "_open", full)
    for before in range(999, 0, -1):
        history._write([sample(NOON - before, process="x" * 200)])
    assert len(history._unwritten) <= 20
    assert warnings_of(caplog) == [unwritten(place, "database or disk is full")]
    monkeypatch.undo()
    history._table.close()
    history._write([])
    assert sum(calls_of(history.read(NOON - 7_200, resolution=3_600))) == 1_000
    history._table.close()


def test_what_could_not_be_written_is_tried_again_without_a_new_sample(tmp_path):
    place = tmp_path / "later" / "history.sqlite3"
    history = History(place)
    history._interval = 0.01
    history.add(sample(time.time()))
    while not history._is_failing:
        time.sleep(0.01)
    place.parent.mkdir()
    while history._is_failing:
        time.sleep(0.01)
    assert len(history.read(0)) == 1
    history.close()


def test_a_folder_that_is_not_there_harms_nobody(tmp_path, caplog):
    with History(tmp_path / "nowhere" / "history.sqlite3") as history:
        history.add(sample(time.time()))
        history.close()
        history.add(sample(time.time()))
    assert len(warnings_of(caplog)) == 1


def test_a_file_that_is_deleted_is_made_anew(place):
    history = History(place, clock=lambda: NOON)
    history._write([sample(NOON - 3)])
    place.unlink()
    history._pruned_at = -1_000
    history._write([sample(NOON - 2)])
    history._write([sample(NOON - 1)])
    assert calls_of(history.read(NOON - 60, resolution=60)) == [3]
    history._table.close()


def test_adding_never_waits_for_the_place(make, monkeypatch):
    history = make()
    held = threading.Event()
    monkeypatch.setattr(history, "_write", lambda samples: held.wait(30))
    for number in range(2_000):
        history.add(sample(NOON - 2_000 + number))
    assert len(history._added) <= 600
    held.set()


# Processes


def record(place, process, calls=100_000, *kill_at):
    command = [sys.executable, str(RECORDER), str(place), process, str(calls), *kill_at]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own program


def counted(place, resolution):
    with closing(sqlite3.connect(place)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return sum(calls_of(History(place).read(0, resolution=resolution)))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system that kills")
@pytest.mark.parametrize("milliseconds", [3, 170, 1_200, 1_370, 1_510])
def test_a_process_that_is_killed_loses_a_second_at_most_and_leaves_the_file_whole(place, milliseconds):
    process = record(place, "one")
    added = [process.stdout.readline().split() for _ in range(100)]
    time.sleep(milliseconds / 1_000)
    killed_at = time.time()
    process.kill()
    added.extend(line.split() for line in process.communicate()[0].splitlines() if line.count(" ") == 1)
    known = sum(float(at) < killed_at - 1 for _, at in added)
    in_seconds = counted(place, 1)
    assert known <= in_seconds <= len(added) + 1
    assert counted(place, 60) == counted(place, 3_600) == in_seconds


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system that kills")
@pytest.mark.parametrize("row", ["1", "2", "30", "31", "32", "33", "34", "35"])
def test_a_process_that_is_killed_while_it_writes_leaves_all_rows_of_a_second_or_none(place, row):
    process = record(place, "one", 1_000, row)
    process.communicate(timeout=50)
    assert process.returncode == -signal.SIGKILL
    assert counted(place, 1) == counted(place, 60) == counted(place, 3_600)


def test_a_file_is_written_on_after_a_process_was_killed(place):
    process = record(place, "one")
    for _ in range(300):
        process.stdout.readline()
    process.kill()
    process.communicate()
    before = counted(place, 60)
    with History(place) as history:
        history.add(sample(time.time(), 5))
    assert counted(place, 60) == before + 5


def test_two_processes_write_to_one_file(place):
    processes = [record(place, name, 200) for name in ("one", "two")]
    for process in processes:
        process.communicate(timeout=60)
    found = History(place).read(0, resolution=3_600)
    by_process = {name: sum(calls_of(it for it in found if it.process == name)) for name in ("one", "two")}
    assert by_process == {"one": 200, "two": 200}


FORK = """
import os, sys, time
from contextlib import suppress
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample

def sample(process):
    return Sample(time.time(), 1.0, process, (Reading("models", "A", {"calls": 1}),))

history = History(sys.argv[1])
history._interval = 0
history.add(sample("parent"))
while True:
    time.sleep(0.01)
    with suppress(ValueError):
        if history.read(0):
            break
child = os.fork()
if child == 0:
    history.add(sample("child"))
    history.close()
    os._exit(0)
os.waitpid(child, 0)
time.sleep(0.01)
history.add(sample("parent"))
history.close()
print(*sorted(it.process for it in history.read(0, resolution=3600)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.parametrize("url", ["", "sqlite:///"], ids=["sqlite3", "SQLAlchemy"])
def test_a_forked_child_writes_beside_its_parent(place, url):
    if url:
        pytest.importorskip("sqlalchemy")
    finished = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-W", "ignore", "-c", FORK, f"{url}{place}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert finished.stdout.split() == ["child", "parent"]
    assert counted(place, 3_600) == 3


# URLs


def test_a_password_is_never_shown(caplog):
    pytest.importorskip("sqlalchemy")
    sqlalchemy = pytest.importorskip("sqlalchemy")
    with pytest.raises(ConfigurationError) as caught:
        History("nonesuch://user:secret@host/name")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
    history = History("sqlite://")
    history._table._url = sqlalchemy.make_url("postgresql://user:secret@host/name")
    history._table.place = history._table._url.render_as_string(hide_password=True)
    assert "secret" not in repr(history)


def test_a_url_without_sqlalchemy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(ImportError, match=r"resilience-kit\[history\]"):
        History("sqlite://")


def test_a_database_that_fails_is_told_by_the_name_of_its_error_alone(tmp_path, caplog):
    pytest.importorskip("sqlalchemy")
    history = History(f"sqlite:///{tmp_path}/nowhere/history.sqlite3")
    history._write([sample(NOON)])
    with pytest.raises(ConfigurationError, match=r"OperationalError$"):
        history.read(0)
    assert warnings_of(caplog)[0].endswith(
        "cannot be written: OperationalError; the last ten minutes are kept until it can"
    )
    history._table.close()


def test_keys_are_in_the_order_in_which_they_are_given_up():
    assert sorted([Key(60, 0, "a"), Key(1, 5, "a"), Key(3_600, 0, "a"), Key(1, 4, "b")]) == [
        Key(1, 4, "b"),
        Key(1, 5, "a"),
        Key(60, 0, "a"),
        Key(3_600, 0, "a"),
    ]


def test_all_of_a_history_is_the_same_at_each_resolution(written):
    history = written(*(sample(NOON - 3_600 + 7 * number, number) for number in range(300)))
    totals = {calls_of([merge(history.read(0, resolution=resolution))])[0] for resolution in (1, 60, 3_600)}
    assert totals == {sum(range(300))}
