"""Each second is counted once, in the innermost section."""

import time

import pytest
import torch

from detr_accel.monitor.stopwatch import Stopwatch


def test_inner_time_is_taken_from_the_outer_section():
    clock = Stopwatch(torch.device("cpu"))
    begun = time.perf_counter()
    with clock.section("outer"):
        time.sleep(0.05)
        with clock.section("inner"):
            time.sleep(0.1)
        time.sleep(0.05)
    whole = time.perf_counter() - begun
    taken = clock.take()
    assert sum(taken.values()) == pytest.approx(whole, abs=5e-3)
    assert taken["inner"] >= 0.1 and taken["outer"] >= 0.1
    assert clock.take() == {}


def test_a_watched_method_is_timed_and_gives_what_it_gave():
    class Thing:
        def double(self, x, *, plus=0):
            time.sleep(0.02)
            return 2 * x + plus

    thing, clock = Thing(), Stopwatch(torch.device("cpu"))
    clock.watch(thing, "double", "work")
    assert thing.double(4, plus=1) == 9 and Thing().double(1) == 2
    assert clock.take()["work"] >= 0.02


def test_a_section_that_fails_is_closed():
    clock = Stopwatch(torch.device("cpu"))
    with pytest.raises(KeyError), clock.section("a"):
        raise KeyError
    with clock.section("b"):
        pass
    assert set(clock.take()) == {"a", "b"}
