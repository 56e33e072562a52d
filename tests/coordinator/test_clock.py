import time

import pytest

from coordinator.clock import Clock, ManualClock, WallClock


def test_the_wall_clock_tells_utc_milliseconds() -> None:
    before = time.time_ns() // 1_000_000
    told = WallClock().now_ms()
    assert before <= told <= time.time_ns() // 1_000_000


def test_the_wall_clock_stays_above_the_time_that_was_stored_last() -> None:
    tomorrow = time.time_ns() // 1_000_000 + 86_400_000
    assert 0 <= WallClock(floor_ms=tomorrow).now_ms() - tomorrow < 5_000


def test_a_clock_that_is_set_back_goes_on_at_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = WallClock()
    first = clock.now_ms()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    ticks = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: ticks + 3_000_000_000)
    assert 3_000 <= clock.now_ms() - first < 8_000
    assert clock.now_ms() == clock.now_ms()


def test_the_manual_clock_moves_forward_only_and_only_when_told() -> None:
    clock: Clock = ManualClock(5)
    assert clock.now_ms() == clock.now_ms() == 5
    assert ManualClock(5).advance(7) == 12
    with pytest.raises(ValueError, match="does not go back"):
        ManualClock(5).advance(-1)
