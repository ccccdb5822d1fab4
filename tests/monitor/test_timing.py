import pytest

from detr_accel.monitor.timing import Eta, Meter, words
from detr_accel.structures import LoaderTime, StepStats


def stats(num_images: int, seconds: float, wait_seconds: float, padding: float = 0.0, **more) -> StepStats:
    return StepStats(
        1, 1, 0.1, 1.0, {}, 1.0, {}, {}, num_images, 0, seconds, wait_seconds, facts={"padding": padding}, **more
    )


def test_eta_says_nothing_before_twenty_windows():
    eta = Eta(1000, 100)
    for window in range(1, 20):
        eta.add(window, 1.0)
        assert eta.sentence() is None
    eta.add(20, 1.0)
    assert eta.sentence() is not None


def test_eta_counts_evaluations_and_checkpoints_and_ignores_slow_first_windows():
    eta = Eta(1000, 100, num_evaluations=10, num_checkpoints=10)
    eta.add(1, 300.0)
    for window in range(2, 101):
        eta.add(window, 2.0)
    assert "evaluations and checkpoints not yet measured" in eta.sentence()
    assert eta.seconds_left() == pytest.approx(900 * 2.0)
    eta.add_other("evaluation", 60.0)
    eta.add_other("checkpoint", 10.0)
    assert eta.seconds_left() == pytest.approx(900 * 2.0 + 9 * 60 + 9 * 10)
    assert eta.sentence() == (
        "2 s per window, 4 min per epoch, 40 min left (900 of 1000 windows), evaluations and checkpoints included"
    )


def test_eta_of_a_resumed_run_counts_only_what_is_left():
    eta = Eta(1000, 100, start_window=900, after=1)
    eta.add(901, 3.0)
    assert eta.seconds_left() == pytest.approx(99 * 3.0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (99, "99 s"), (125, "2 min"), (3590, "1 h 00 min"),
     (11100, "3 h 05 min"), (187200, "2 d 4 h")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds, said):
    assert words(seconds) == said


def test_meter_averages_since_the_last_row():
    meter = Meter()
    meter.add(stats(8, 2.0, 0.5, padding=0.4))
    meter.add(stats(4, 1.0, 0.1, padding=0.2))
    assert meter.take() == pytest.approx(
        {"seconds": 1.5, "wait_seconds": 0.3, "wait_fraction": 0.2, "images_per_second": 4.0, "padding": 0.3}
    )
    meter.add(stats(8, 4.0, 0.0))
    assert meter.take()["images_per_second"] == pytest.approx(2.0)


def test_meter_tells_the_parts_of_the_time_and_what_the_loader_did():
    meter = Meter()
    spent = LoaderTime(read=0.1, decode=0.3, pixels=0.4, images=4, stream=0.2)
    for _ in range(2):
        meter.add(stats(4, 1.0, 0.2, sections={"wait": 0.2, "forward": 0.6, "backward": 1.2}, loader=spent, workers=2))
    row = meter.take()
    assert row["share_wait"] == pytest.approx(0.1) and row["share_backward"] == pytest.approx(0.6)
    assert (row["read_ms"], row["decode_ms"], row["pixels_ms"]) == pytest.approx((25, 75, 100))
    assert row["stream_ms"] == pytest.approx(50), "of which no loader process knows"
    assert row["loader_busy"] == pytest.approx(0.4), "0.8 s of work in a window of 1 s, by two processes"
    assert not any(name.startswith("share_") for name in meter.take()), "it starts anew"
