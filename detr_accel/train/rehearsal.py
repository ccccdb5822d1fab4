"""The minutes before the night run: ``train.py --recipe R --rehearse``.

One process, the launcher's first, leads; the others end at once, before any process group is made. It starts the real
``train`` several times as it was started itself (same flags, processes, precision, config file): a trial
(``rehearsal_trial``), a short run, the same run once more and killed in the middle, and that one resumed. All of it
lives in ``runs/.rehearsal-NAME``; ``runs/NAME`` is looked at and never written.

It ends with ``safe to leave`` (exit code 0), or with ``not safe to leave``, the one reason and its remedy (1).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from detr_accel import monitor
from detr_accel import recipe as recipes
from detr_accel.monitor import jsonl
from detr_accel.monitor.alarms import OUT_OF_REACH
from detr_accel.monitor.timing import words
from detr_accel.recipe import Recipe
from detr_accel.structures import UserError
from detr_accel.train import checkpoint, launch, rehearsal_compare, rehearsal_trial
from detr_accel.train.loop import train
from detr_accel.train.rehearsal_process import Child, Starter, Trouble
from detr_accel.train.resuming import wants_resume
from detr_accel.train.run_folder import RunFolder, write_atomic

SILENCE_S = 900.0  # a stage of which nothing is heard for so long hangs
KILL_AFTER_S = 4.0  # the second half of the short run lasts at least so long: a kill must hit it
MOST_WINDOWS = 400  # of the short run
NEVER = 1e9  # epochs
JOB = "job.json"


def main(recipe: Recipe, runs: Path, minutes: float) -> int:
    """What ``--rehearse`` does; returns the exit code.

    Args:
        runs: the folder that holds all runs.
        minutes: about how long it may take. Every stage does its least, however little that is.
    Raises:
        UserError: wrong use, such as processes on several machines.
    """
    if int(os.environ.get("RANK") or 0) != 0:
        return 0
    world, local = (int(os.environ.get(k) or 1) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world > 1 and local not in (1, world):
        raise UserError("a rehearsal knows one machine only: start it on one of them, without --num_machines")
    return rehearse(recipe, runs=runs, minutes=minutes, starter=Starter.as_started())


def rehearse(
    recipe: Recipe, *, runs: Path, minutes: float, starter: Starter, say: Callable[[str], None] | None = None
) -> int:
    """Lead a rehearsal; see ``main``.

    Args:
        starter: how to start ``train``.
        say: gets every line.
    """
    if minutes <= 0:
        raise UserError(f"--rehearse-minutes {minutes:g}: give a number above 0, such as 10")
    say = say or (lambda line: print(line, flush=True))
    rehearsal = _Rehearsal(recipe, runs, minutes, starter, say)
    place = RunFolder(rehearsal.folder)
    try:
        place.acquire()  # two rehearsals of one run would write over each other
    except UserError as error:
        say(f"not safe to leave: {error}")
        return 1
    passed = False
    try:
        with _stopped_by_signals():
            rehearsal.clear()
            passed = rehearsal.run()
    finally:
        if passed:
            shutil.rmtree(rehearsal.folder, ignore_errors=True)
        else:  # the words stay, the weights go
            for weights in list(rehearsal.folder.glob("**/checkpoints")):
                shutil.rmtree(weights, ignore_errors=True)
        place.release()
    return 0 if passed else 1


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end it as Ctrl-C does: with the children ended. What is ignored stays so."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, interrupt) for s in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def job(recipe: Recipe, file: Path, runs: Path, resume: bool | str) -> None:
    """What a child does: the trial, or a real run that evaluates on fewer images."""
    what = json.loads(file.read_text(encoding="utf-8"))
    if what["part"] == "trial":
        try:
            rehearsal_trial.run(recipe, file.parent, what["minutes"])
        except Trouble as trouble:
            raise UserError(str(trouble)) from None
        return
    train(recipe, runs=runs, resume=resume, max_val_images=what["max_val_images"])


class _Rehearsal:
    """The stages in their order; each says one line, or raises the reason why not."""

    def __init__(self, recipe: Recipe, runs: Path, minutes: float, starter: Starter, say) -> None:
        self.recipe, self.runs, self.minutes, self.starter, self.say = recipe, runs, minutes, starter, say
        self.folder = runs / f".rehearsal-{recipe.name}"
        self.begun = time.perf_counter()
        self.rows: dict[str, dict[str, Any]] = {}  # of the trial, by stage
        self.num_warnings = 0
        self.wandb_mode = "disabled"

    def clear(self) -> None:
        """What an earlier rehearsal left behind, the lock that is held apart."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(self) -> bool:
        """Whether it is safe to leave."""
        name = self.recipe.name
        self.say(
            f"rehearsal of {name}, about {self.minutes:g} min: {self.runs / name} is not touched, what is written lies "
            f"in {self.folder}"
        )
        try:
            self._launch()
            self._trial()
            short = self._short_run()
            self._kill_and_resume(short)
            self._wandb(short)
            self._disk(short)
            finish = self._time(short)
        except (Trouble, OSError) as trouble:
            if isinstance(trouble, OSError):
                reason = f"{trouble.filename or self.folder}: {trouble.strerror or trouble}"
                trouble = Trouble("disk", reason, "free space there, or choose another disk with --runs")
            self.say(f"not safe to leave: {trouble}")
            self.say(f"what was seen lies in {self.folder}; the next rehearsal clears it")
            return False
        warned = f" with {self.num_warnings} warning{'s' * (self.num_warnings > 1)} above" if self.num_warnings else ""
        self.say(f"safe to leave{warned}: {finish}")
        return True

    def _tell(self, stage: str, text: str, seconds: float, warnings: list[str] | tuple[str, ...] = ()) -> None:
        self.say(f"{'warn' if warnings else 'ok':4}  {stage:11} {seconds:6.1f} s  {text}")
        for line in warnings:
            self.say(f"      warning: {line}")
        self.num_warnings += len(warnings)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A stage of this process: it fills in ``text`` and ``warnings``. Mistakes become the reason why not."""
        row: dict[str, Any] = {"text": "", "warnings": []}
        begun = time.perf_counter()
        try:
            yield row
        except UserError as error:
            raise Trouble(name, ". ".join(str(error).splitlines())) from None
        self._tell(name, row["text"], time.perf_counter() - begun, row["warnings"])

    # --- before anything is started

    def _launch(self) -> None:
        """Would the night's command be refused at its first step?"""
        recipe = self.recipe
        with self._stage("launch") as row:
            request = launch.launcher_request()
            precision = launch.check_before(
                dict(os.environ), request, recipe_precision=recipe.precision, device=recipe.device
            )
            place = RunFolder(self.runs / recipe.name)
            wants_resume(place, False)  # refuses as the start would
            if place.held_by_another():
                raise UserError(f"{place.path} is being written by another process: give this run another name=...")
            self.wandb_mode = monitor.wandb_mode(recipe)
            self.processes = int(os.environ.get("WORLD_SIZE") or 1)
            started = "accelerate launch" if request else "python"
            processes = f"{self.processes} process{'es' * (self.processes > 1)}"
            row["text"] = f"{started}, {processes}, precision {precision}; W&B {self.wandb_mode}"

    # --- children

    def _start(self, name: str, changes: dict[str, Any], arguments: list[str] | None = None, **what: Any) -> Child:
        """A child in a folder of its own, whose name is that of the stage."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        write_atomic(folder / JOB, json.dumps(what))
        write_atomic(folder / "recipe.yaml", recipes.dumps(self.recipe))
        keys = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        files = ["--recipe", str(folder / "recipe.yaml"), "--runs", str(folder), "--rehearsal-job", str(folder / JOB)]
        log = folder / f"{'resumed' if arguments else 'output'}.txt"
        return Child(self.starter, [*files, *(arguments or []), *keys], log)

    def _trial(self) -> None:
        folder, told = self.folder / "trial", 0
        report = folder / rehearsal_trial.FILE

        def tell_new() -> None:
            nonlocal told
            rows = jsonl.read(report)
            for row in rows[told:]:
                self.rows[row["stage"]] = row
                if row["state"] == "fail":
                    raise Trouble(row["stage"], row["text"], row["remedy"])
                if row["text"]:
                    self._tell(row["stage"], row["text"], row["seconds"], row["warnings"])
            told = len(rows)

        with self._start("trial", {}, part="trial", minutes=self.minutes) as child:
            child.wait("trial", [report], max(SILENCE_S, 60 * self.minutes), tell_new)
            tell_new()
        if "numbers" not in self.rows:
            done = list(self.rows)
            after = f"after the stage {done[-1]}" if done else "start"
            raise Trouble(after, child.refusal())

    def _short_changes(self) -> dict[str, Any]:
        """What a short run changes in the recipe: its length, how often it saves and evaluates, and nothing that the
        training itself would notice. What ``auto`` found stays as it was found."""
        numbers = self.rows["numbers"]
        half = math.ceil(KILL_AFTER_S / max(1e-3, self.rows["windows"]["seconds_per_window"]))
        half = min(max(2, half), MOST_WINDOWS // 2)
        return {
            "name": f"{self.recipe.name}-rehearsal", "schedule.steps": 2 * half, "schedule.kind": "constant",
            "log.every": 1,
            "checkpoint.every_steps": half, "checkpoint.every_epochs": NEVER, "checkpoint.every_minutes": None,
            "checkpoint.keep": 1, "evaluate.every_epochs": NEVER,
            "evaluate.train_images": min(numbers["train_images"], self.rows["evaluation"]["images"]),
            "batch.micro": numbers["micro"],
            "data.cache": "none",  # of another validation split than the night's, and long to build
            "model.activation_checkpointing": numbers["checkpointed"], "log.wandb.upload_weights": False,
            "log.wandb.tags": [*self.recipe.log.wandb.tags, "rehearsal"],
        }  # fmt: skip

    def _run_child(self, stage: str, name: str, changes: dict[str, Any], *arguments: str) -> Path:
        """A run to its end.

        Returns:
            its run folder.
        """
        run = self.folder / name / changes["name"]
        images = self.rows["evaluation"]["images"]
        with self._start(name, changes, list(arguments), part="run", max_val_images=images) as child:
            child.wait(stage, [run / "metrics.jsonl"], self._silence())
            status = _status(run)
            if status.get("state") != "done":
                raise Trouble(stage, status.get("reason") or child.refusal())
        return run

    def _silence(self) -> float:
        """A window or an evaluation is long on a slow machine: ten times what the trial saw is no hang."""
        window = self.rows["windows"]["seconds_per_window"]
        return max(SILENCE_S, 10 * window, 10 * self.rows["evaluation"]["seconds"])

    def _short_run(self) -> Path:
        with self._stage("run") as row:
            changes = self._short_changes()
            run = self._run_child("run", "whole", changes)
            rows = jsonl.read(run / "metrics.jsonl")
            losses = [r["train/loss"] for r in rows if "train/loss" in r]
            value = next((r[f"val/{self.recipe.evaluate.metric}"] for r in rows if "val/AP" in r), None)
            row["warnings"] = _alarms(run)
            metric = f"{self.recipe.evaluate.metric} {'undefined' if value is None else f'{100 * value:.1f}'}"
            row["text"] = (
                f"{len(losses)} windows as in the night, evaluated and saved: loss {losses[0]:.4g} -> "
                f"{losses[-1]:.4g}, {metric}"
            )
        return run

    def _kill_and_resume(self, whole: Path) -> None:
        changes = self._short_changes() | {"log.wandb.enabled": False}
        half = changes["checkpoint.every_steps"]
        run = self.folder / "killed" / changes["name"]
        with self._stage("kill") as row:
            reached = self._killed(changes, run, half)
            kept = [p.name for p in run.glob("checkpoints/window-*") if checkpoint.damage(p) is None]
            if checkpoint.folder_name(half) not in kept:
                raise Trouble("kill", f"no whole checkpoint of window {half} was left", "look at the disk under --runs")
            row["text"] = f"SIGKILL to all processes after window {reached}; the checkpoint of window {half} is whole"
        loss = rehearsal_compare.next_loss(run, half)  # two trainings on a GPU part before any kill
        with self._stage("resume") as row:
            self._run_child("resume", "killed", changes, "--resume")
            exact = self.rows["devices"]["device"] == "cpu" or self.recipe.deterministic
            row["text"], row["warnings"] = rehearsal_compare.compare(whole, run, half, exact=exact, loss=loss)

    def _killed(self, changes: dict[str, Any], run: Path, half: int) -> int:
        """Start the run and kill it after its checkpoint; returns the window it had reached."""
        images = self.rows["evaluation"]["images"]
        last = run / "checkpoints" / "last"

        def passed() -> bool:
            return last.is_symlink() and _last_window(run) > half

        with self._start("killed", changes, part="run", max_val_images=images) as child:
            child.wait("kill", [run / "metrics.jsonl"], self._silence(), passed)
            if not child.running and _status(run).get("state") != "done":
                raise Trouble("kill", _status(run).get("reason") or child.refusal())
            child.kill()
        if _status(run).get("state") == "done":
            raise Trouble("kill", "the short run was over before it could be killed", "rehearse once more")
        return _last_window(run)

    # --- after them

    def _wandb(self, run: Path) -> None:
        if self.wandb_mode == "disabled":
            return
        with self._stage("W&B") as row:
            said = (self.folder / "whole" / "output.txt").read_text(errors="replace")
            note = next((line for line in said.splitlines() if line.startswith("W&B: ")), "")
            failed = next((line for line in said.splitlines() if "W&B failed" in line), None)
            if failed is None and note.startswith("W&B: off,"):
                if self.recipe.log.wandb.mode == "auto":
                    row |= {"warnings": [f"{note.removeprefix('W&B: ')}; so would the night"], "text": "off"}
                    return
                failed = note.removeprefix("W&B: ")
            if failed is not None:
                raise Trouble("W&B", failed, "set log.wandb.mode=offline or log.wandb.enabled=false")
            went_offline = self.wandb_mode == "online" and note.startswith("W&B: offline")
            if went_offline and self.recipe.log.wandb.mode == "online":
                raise Trouble("W&B", note.removeprefix("W&B: "), "mend the connection, or set log.wandb.mode=offline")
            if went_offline:
                row["warnings"] = [f"{note.removeprefix('W&B: ')}; the night would be written offline, too"]
            if self.wandb_mode == "online" and not went_offline:
                row["text"] = f"written: {note.removeprefix('W&B: ')} (tag rehearsal; delete it there when you like)"
                return
            rows = rehearsal_compare.offline_rows(run)
            if rows == 0:
                raise Trouble("W&B", f"the offline run below {run / 'wandb'} has no rows", "look at the disk")
            row["text"] = f"offline, {rows} rows in the file; `wandb sync` sends such a run"

    def _disk(self, run: Path) -> None:
        """Checkpoints and captures as the trial reckoned them, and what the short run's files will have grown to."""
        with self._stage("disk") as row:
            numbers = self.rows["numbers"]
            w = [row for row in jsonl.read(run / "speed.jsonl") if "speed/seconds" in row]
            windows = max(1, len(w))
            logged = numbers["total"] / self.recipe.log.every
            logs = logged / windows * sum((run / f).stat().st_size for f in ("metrics.jsonl", "speed.jsonl"))
            files = [p for p in (run / "wandb").rglob("*") if p.is_file() and not p.is_symlink()]
            media = sum(p.stat().st_size for p in files if "media" in p.parts)
            other = sum(p.stat().st_size for p in files) - media
            sent = self._num_evaluations() * media + logged / windows * other
            needed = self.rows["disk"]["needed_bytes"] + logs + sent
            own = sum(p.stat().st_size for p in self.folder.rglob("*.safetensors") if not p.is_symlink())
            free = shutil.disk_usage(self.runs).free + own  # the rehearsal's own checkpoints go when it is over
            mib = [f"{x / 2**20:,.0f} MiB" for x in (self.rows["disk"]["needed_bytes"], logs, sent, free)]
            told = f"checkpoints and captures {mib[0]}, logs {mib[1]}, W&B {mib[2]}; {mib[3]} free in {self.runs}"
            if needed > free:
                raise Trouble("disk", told, "free space there, raise log.every, or choose another disk with --runs")
            row["text"] = told

    def _num_evaluations(self) -> int:
        """Every so many epochs, and at the end."""
        numbers = self.rows["numbers"]
        return math.ceil(numbers["total"] / max(1, round(self.recipe.evaluate.every_epochs * numbers["per_epoch"])))

    def _time(self, run: Path) -> str:
        """When the night run will be done, and what that rests on."""
        numbers, recipe = self.rows["numbers"], self.recipe
        seconds = [r["speed/seconds"] for r in jsonl.read(run / "speed.jsonl") if "speed/seconds" in r]
        window = median(seconds[len(seconds) // 4 :])
        evaluation = self.rows["evaluation"]["seconds_per_image"] * (numbers["val_images"] + numbers["train_images"])
        save = self.rows["checkpoint"]["save_seconds"]
        every = max(1, round(recipe.checkpoint.every_epochs * numbers["per_epoch"]))
        saves = math.ceil(numbers["total"] / every) + numbers["total"] // (recipe.checkpoint.every_steps or math.inf)
        evaluations = self._num_evaluations()
        total = numbers["total"] * window + evaluations * evaluation
        if recipe.checkpoint.every_minutes is not None:
            saves += int(total / (60 * recipe.checkpoint.every_minutes))
        total += saves * save
        done = datetime.datetime.now() + datetime.timedelta(seconds=total)
        often = f"{evaluations} evaluation{'s' * (evaluations > 1)} at {words(evaluation)}"
        often += f", {saves:.0f} checkpoint{'s' * (saves > 1)} at {words(save)}"
        return (
            f"training will finish about {done:%Y-%m-%d %H:%M} ({words(total)}) if it is started now: "
            f"{numbers['total']} windows at {window:.3g} s, {often}; the machine as free as now. The rehearsal took "
            f"{words(time.perf_counter() - self.begun)}"
        )


def _status(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _last_window(run: Path) -> int:
    rows = jsonl.read(run / "metrics.jsonl")
    return rows[-1]["window"] if rows else 0


def _alarms(run: Path) -> list[str]:
    """What the short run was alarmed by; what is out of reach, the look at the data has said.

    Raises:
        Trouble: windows that are not finite, so early in the run.
    """
    alarms = jsonl.read(run / "alarms.jsonl")
    for row in alarms:
        if row["title"] == "Non-finite window":
            raise Trouble("run", f"{row['title']}: {row['text']}")
    return [f"{row['title']}: {row['text']}" for row in alarms if row["title"] != OUT_OF_REACH]
