"""In a pipe: plain lines. In a terminal: bars, and lines above them."""

import errno
import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading

import pytest

from detr_accel.monitor.console import Console
from detr_accel.monitor.timing import words
from detr_accel.structures import StepStats


def stats(window: int) -> StepStats:
    return StepStats(
        window, window, window / 10, 1.5, {"loss_ce": 1.0}, 0.25, {}, {"backbone": 1e-5, "heads": 1e-4}, 8, 30, 0.5, 0.1
    )


def talk(console: Console) -> None:
    for window in range(1, 26):
        console.tick(stats(window))
        if window % 5 == 0:
            console.log(stats(window), {"images_per_second": 16.0, "wait_fraction": 0.2}, 90.0)
        if window == 13:
            console.say("a line in between")
    assert list(console.progress(range(3), "evaluate", 3)) == [0, 1, 2]
    console.close()


def test_piped_output_is_plain_lines():
    stream = io.StringIO()
    talk(Console(25, 10, stream=stream))
    text = stream.getvalue()
    assert not re.search(r"[^\n\x20-\x7e]", text), "no escape sequence, no carriage return, no block characters"
    lines = text.splitlines()
    assert len(lines) == 6
    assert lines[1] == (
        "epoch 1.00 window 10/25: loss 1.5, lr 0.0001, grad 0.25, 16 images/s, data wait 20 %, 90 s left"
    )
    assert lines[2] == "a line in between"


def test_a_stream_that_knows_ascii_only_gets_every_line():
    raw = io.BytesIO()
    console = Console(25, 10, stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.say("Gr\u00f6\u00dfe")
    assert raw.getvalue() == b"Gr??e\n"


def in_terminal(use, columns: int = 120) -> str:
    """What a terminal shows of it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    read: list[bytes] = []

    def drain() -> None:
        try:
            while chunk := os.read(master, 4096):
                read.append(chunk)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        use(stream)
    reader.join(timeout=10)
    os.close(master)
    return b"".join(read).decode()


@pytest.mark.parametrize("start", [0, 7])
def test_terminal_shows_bars_and_lines_above_them(start):
    def use(stream) -> None:
        console = Console(25, 10, start, stream=stream)
        assert console.bars is not None
        epochs, steps = console.bars
        for window in range(start + 1, 26):
            console.tick(stats(window))
            assert steps.n == (window - 1) % 10 + 1
            assert steps.total == (10 if window <= 20 else 5), "the last epoch is shorter"
            assert epochs.n == pytest.approx(window / 10)
        console.say("a line in between")
        console.log(stats(25), {"images_per_second": 16.0, "wait_fraction": 0.2}, 90.0)
        console.close()

    text = in_terminal(use)
    assert "epochs" in text and "steps" in text and "loss 1.5, lr 0.0001" in text
    assert "a line in between\r\n" in text
    assert "window 25/25" not in text, "the bar shows it already"


class Full:
    """A stream on a disk that is full, or on a terminal that is gone."""

    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self.number, self.tried = number, 0

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        self.tried += 1
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None: ...


@pytest.mark.parametrize("number, tried", [(errno.ENOSPC, 3), (errno.EDQUOT, 3), (errno.EIO, 1), (errno.EPIPE, 1)])
def test_a_line_that_cannot_be_written_is_lost_and_the_run_goes_on(number, tried):
    stream = Full(number)
    console = Console(25, 10, stream=stream)
    for text in ("one", "two", "three"):
        console.say(text)
    assert stream.tried == tried, "a full disk may have room again; who has gone does not come back"


def test_a_terminal_that_is_gone_ends_the_bars_and_not_the_run(monkeypatch):
    def use(stream) -> None:
        console = Console(25, 10, stream=stream)
        with monkeypatch.context() as patch:
            patch.setattr("tqdm.tqdm.write", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
            console.say("a line")
        assert console.bars is None
        console.tick(stats(3))
        console.say("another")
        console.close()

    in_terminal(use)


def test_the_time_left_in_a_terminal_is_the_runs_own():
    def use(stream) -> None:
        console = Console(25, 10, stream=stream)
        console.tick(stats(3), 5400.0)
        console.bars[0].refresh()
        console.close()

    assert f"{words(5400.0)} left" in in_terminal(use)


def test_a_terminal_without_width_gets_plain_lines():
    def use(stream) -> None:
        talk(Console(25, 10, stream=stream))

    assert "epoch 1.00 window 10/25" in in_terminal(use, columns=0)
