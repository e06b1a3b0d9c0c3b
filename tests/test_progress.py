"""Progress of long work: lines with speed and time left, and signs of life for the watchdog."""

import time

from qkvjax import progress
from qkvjax.progress import duration


def test_lines_say_how_far_how_fast_and_how_long(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = []
    alive = []
    with progress.Progress(
        "scoring", 100, "labels", log=lines.append, alive=lambda: alive.append(1)
    ) as work:
        time.sleep(0.01)
        work.add(25)
        work.add(75)
    assert len(alive) == 2
    assert lines[0].startswith("scoring: 25 of 100 labels, ") and lines[0].endswith(" left")
    assert "100 of 100" in lines[1]


def test_short_work_says_nothing():
    lines = []
    with progress.Progress("scoring", 100, "labels", log=lines.append) as work:
        work.add(100)
    assert lines == []


def test_what_was_done_before_has_no_speed(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = []
    with progress.Progress("tokenising", 9, "MB", log=lines.append, at_most=True) as work:
        work.add(5, skipped=True)
    assert lines == ["tokenising: 5 of at most 9 MB, 0 MB a second"]


def test_one_long_call_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1.0)
    lines = []
    alive = []
    with progress.working("compiling", log=lines.append, alive=lambda: alive.append(1)):
        time.sleep(2.5)
    assert len(alive) >= 2 and lines[0].startswith("compiling: 1 s so far")


def test_a_call_that_hangs_stops_being_alive():
    alive = []
    with progress.working("hanging", log=print, alive=lambda: alive.append(1), limit=0.0):
        time.sleep(1.5)
    assert not alive


def test_durations_read_well():
    assert [duration(s) for s in (47.6, 200, 7500)] == ["48 s", "3 min 20 s", "2 h 05 min"]
