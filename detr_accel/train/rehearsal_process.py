"""Child processes of a rehearsal: started as this program was started, watched, and killed with all they started."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

import detr_accel
from detr_accel.structures import UserError
from detr_accel.train import launch

POLL_S = 0.02
_OWN_PORT = ("--main_process_port", "--main-process-port")
_KILLED = re.compile(r"SIGKILL|Signal 9|signal 9|exitcode\s*:\s*-9")


class Trouble(Exception):
    """The one reason why it is not safe to leave.

    Args:
        stage: where it showed.
        text: what is wrong, with its remedy where ``remedy`` is empty.
    """

    def __init__(self, stage: str, text: str, remedy: str = "") -> None:
        super().__init__(stage, text, remedy)
        self.stage, self.text, self.remedy = stage, text, remedy

    def __str__(self) -> str:
        said = "; ".join(" ".join(part.split()) for part in (self.text, self.remedy) if part)
        return f"{self.stage}: {said}"


@dataclass(frozen=True)
class Starter:
    """How to start ``train`` the way this program was started.

    Args:
        command: what comes before the arguments of ``train``.
        env: the environment of the start, not the one that a launcher made for its processes.
    """

    command: list[str]
    env: dict[str, str]

    @classmethod
    def as_started(cls) -> Starter:
        """
        Raises:
            UserError: several processes that no ``accelerate launch`` on this machine has started.
        """
        package = str(Path(detr_accel.__file__).parents[1])
        found = launch.launcher_command()
        if found is None:
            if int(os.environ.get("WORLD_SIZE") or 1) > 1:
                raise UserError(
                    "a rehearsal starts its runs through `accelerate launch`, and these processes were started by "
                    "something else: start them with accelerate launch"
                )
            env = dict(os.environ)
            env["PYTHONPATH"] = os.pathsep.join(p for p in (package, env.get("PYTHONPATH")) if p)
            return cls([sys.executable, "-m", "detr_accel.cli", "train"], env)
        flags, script, env = found
        env["PYTHONPATH"] = os.pathsep.join(p for p in (package, env.get("PYTHONPATH")) if p)
        verb = ["train"] if script[1:2] == ["train"] else []
        front = [sys.executable, "-m", "accelerate.commands.launch", *_without_port(flags), "--main_process_port", "0"]
        return cls([*front, script[0], *verb], env)


def _without_port(flags: list[str]) -> list[str]:
    kept, skip = [], False
    for word in flags:
        if not skip and word.partition("=")[0] not in _OWN_PORT:
            kept.append(word)
        skip = not skip and word in _OWN_PORT
    return kept


class Child:
    """One start of ``train``. Leaving the ``with`` block ends whatever of it still runs.

    Args:
        arguments: of ``train``.
        log: file for everything that it says.
    """

    def __init__(self, starter: Starter, arguments: list[str], log: Path) -> None:
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [*starter.command, *arguments], env=starter.env, stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the launcher, its training processes and their loaders, as a machine that goes down would."""
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            family = [root, *root.children(recursive=True)]
            for process in family:  # a launcher first: it must not see its children go
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(family[1:], timeout=10)
        self.process.wait()

    def wait(self, stage: str, watched: list[Path], silence_s: float, tick: Callable[[], object] = bool) -> None:
        """Until it ends, or until ``tick`` returns something true.

        Args:
            watched: files that grow as long as something goes on, beside the log.
            silence_s: so long may none of them grow.
        Raises:
            Trouble: it hangs.
        """
        seen, since = None, time.monotonic()
        while self.running:
            if tick():
                return
            sizes = [p.stat().st_size if p.exists() else -1 for p in (self.log, *watched)]
            if sizes != seen:
                seen, since = sizes, time.monotonic()
            if time.monotonic() - since > silence_s:
                self.kill()
                raise Trouble(
                    stage, f"nothing was heard of it for {silence_s:.0f} s, so it was ended. Its last words: "
                    f"{self.last_line()}",
                    "look at the disk or network that holds the data, and at the connection between the processes",
                )  # fmt: skip
            time.sleep(POLL_S)

    def refusal(self) -> str:
        """Why it ended, in its own words if it had any."""
        text = self.log.read_text(errors="replace")
        said = [line.removeprefix("detr-accel: ") for line in text.splitlines() if line.startswith("detr-accel: ")]
        if said:
            return ". ".join(dict.fromkeys(said))
        if self.process.returncode == -9 or _KILLED.search(text):
            return (
                "the process was ended from outside (SIGKILL), most often for lack of memory: lower batch.micro, "
                "data.workers or data.prefetch"
            )
        return f"it ended with exit code {self.process.returncode}: {self.last_line()}"

    def last_line(self) -> str:
        """The last line that is an error or says something."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        return (errors or lines or ["none"])[-1]
