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


def test_time_outside_all_sections_is_the_rest():
    clock = Stopwatch(torch.device("cpu"), rest="other")
    with clock.section("work"):
        time.sleep(0.02)
    time.sleep(0.05)
    taken = clock.take()
    assert taken["work"] >= 0.02 and taken["other"] >= 0.05
    time.sleep(0.02)
    assert clock.take()["other"] >= 0.02, "it goes on where it was taken"


@pytest.mark.gpu
def test_a_gpu_is_timed_without_waiting_for_it():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    clock = Stopwatch(device, wait=False, rest="other")
    begun = time.perf_counter()
    with clock.section("work"):
        for _ in range(50):
            a = a @ a * 1e-3
    asked = time.perf_counter() - begun
    torch.cuda.synchronize()
    whole = time.perf_counter() - begun
    assert clock.take()["work"] > 0.5 * whole > asked, "the device's time, not that of asking for it"


def test_a_section_that_fails_is_closed():
    clock = Stopwatch(torch.device("cpu"))
    with pytest.raises(KeyError), clock.section("a"):
        raise KeyError
    with clock.section("b"):
        pass
    assert set(clock.take()) == {"a", "b"}
