"""The training, straight down the page: set up, then one window after another.

Two counters: ``window`` only ever grows (sample order, seeds, the log's axis); ``step`` counts accepted updates
(schedule, average), and a rollback takes it back. Sample order, augmentation and dropout are functions of (seed, epoch,
position), so the place in the run is all that a resume needs to know about randomness.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator

from detr_accel import data, models, monitor
from detr_accel import recipe as recipes
from detr_accel.monitor.alarms import Alarm
from detr_accel.monitor.stopwatch import Stopwatch
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, LoaderTime, StepStats, UserError
from detr_accel.train import launch, memory_fit, parts, plan, resuming, validation
from detr_accel.train.agree import everywhere, on_main
from detr_accel.train.capture import Captures
from detr_accel.train.checkpoint import State
from detr_accel.train.commit import Commit
from detr_accel.train.feeder import Feeder
from detr_accel.train.lost import Roll
from detr_accel.train.lost_images import LostImages
from detr_accel.train.optim import set_lr
from detr_accel.train.parts import Length, Parts
from detr_accel.train.run_folder import RunFolder, write_atomic
from detr_accel.train.saving import Saver
from detr_accel.train.stopping import StopSignal
from detr_accel.train.window import Requests, WindowResult


def train(
    recipe: Recipe, *, runs: Path = Path("runs"), resume: bool | str = False, branch: Path | None = None,
    max_val_images: int | None = None,
) -> Path:  # fmt: skip
    """Train what the recipe says; returns the run folder.

    Args:
        runs: the folder that holds all runs.
        resume: True goes on from the last whole checkpoint of runs/NAME; ``auto`` starts or goes on, whichever applies.
        branch: the folder of another run, whose last checkpoint this one begins from, with a recipe that may differ.
        max_val_images: evaluate on so many images of the validation split (a rehearsal); None takes all.
    Raises:
        UserError: anything the person can mend, in one sentence.
    """
    resuming.check_branch(branch, recipe, runs)
    accelerator = launch.make_accelerator(
        recipe.precision, recipe.device, recipe.dist.overlap, recipe.dist.timeout_minutes,
        log_with_wandb=recipe.log.wandb.enabled, project_dir=runs / recipe.name,
    )  # fmt: skip
    run = RunFolder(runs / recipe.name)
    main = accelerator.is_main_process
    resume = on_main(accelerator, lambda: _claim(run, resume))
    try:
        if not resume:
            recipes.check_new(recipe)
        parts.seed_everything(recipe.seed, recipe.deterministic)
        finished = _train(recipe, accelerator, run, resume, None if resume else branch, max_val_images)
        if main and finished:
            run.status("done")
    except BaseException as error:
        if main and run.began:  # what was refused before it began leaves the status of the run that is there
            interrupted = isinstance(error, KeyboardInterrupt)
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                run.status("resume" if interrupted else "failed", reason=str(error) or type(error).__name__)
        raise
    finally:
        if main:
            run.release()
    return run.path


def _train(
    recipe: Recipe, accelerator: Accelerator, run: RunFolder, resume: bool, branch: Path | None,
    max_val_images: int | None,
) -> bool:  # fmt: skip
    """Returns whether the end was reached (False: asked to stop, state saved)."""
    stop = StopSignal(launch.started_by_launcher())
    try:
        # -- data, model, optimizer; where the last run stopped; how much fits
        split = _saved_split(run.path if resume else branch)
        opened = everywhere(accelerator, lambda: data.build(recipe, split, max_val_images))
        splits = everywhere(accelerator, lambda: data.with_cache(recipe, opened), at_once=True)
        built = everywhere(accelerator, lambda: parts.build(recipe, accelerator, splits, resume=resume or bool(branch)))
        state, notes = resuming.start_or_resume(built, run, resume=resume, branch=branch)
        notes += [*_fit(built, state), *data.who_reads_what(splits.train, accelerator.num_processes)]
        parts.prepare(built)
        size, num_ranks = recipe.batch.size, accelerator.num_processes
        arithmetic = parts.batch_arithmetic(size, state.micro, num_ranks, len(splits.train))
        # -- who watches
        on_main(accelerator, lambda: _write_start(built, run, state))
        fingerprints = {"train": state.fingerprint, "val": splits.val.fingerprint()}
        sinks = monitor.build(
            recipe, run.path, accelerator, total_windows=built.length.total, windows_per_epoch=built.length.per_epoch,
            start_window=state.window, evaluation_owed=state.evaluated_window != state.window,
            fingerprint=fingerprints, wandb_run_id=state.wandb_run_id, parent=state.parent, best=_best(state),
            mode=on_main(accelerator, lambda: monitor.wandb_mode(recipe)),
        )  # fmt: skip
        with sinks, Roll(accelerator, recipe.dist.timeout_minutes).watch(sinks, run, state):
            notes += parts.too_short(recipe, built.length)
            notes += sinks.phases.expect(plan.at_start(built, state.micro, state.checkpointed))
            built.runner.phases = sinks.phases
            for line in [*splits.found, *built.loaded, *notes, launch.describe(accelerator), arithmetic]:
                sinks.say(line)
            finished = _windows(built, run, state, sinks, stop)
            if finished:
                sinks.say(_done(run, state, recipe))
            if accelerator.is_main_process and not finished:  # now: closing may outlast the launcher's patience
                run.status("resume", window=state.window)
            return finished
    finally:
        stop.restore()


def _done(run: RunFolder, state: State, recipe: Recipe) -> str:
    """The run's last line: what there is now, and who takes it."""
    place, words = "last", f"after window {state.window}"
    if (best := _best(state)) is not None:
        place, words = "best", f"{recipe.evaluate.metric} {100 * best[0]:.1f} after window {best[1]}"
    return f"done: {run.checkpoints / place} ({words}); detr-accel eval {run.path} scores it again, predict shows it"


def _best(state: State) -> tuple[float, int] | None:
    return None if state.best is None or state.best_window is None else (state.best, state.best_window)


def _fit(built: Parts, state: State) -> list[str]:
    """Settle images per forward and activation checkpointing: what a checkpoint brings, the recipe's, or by trial."""
    micro, checkpointed = built.recipe.batch.micro, built.recipe.model.activation_checkpointing
    if state.micro is not None:
        models.checkpoint_parts(built.bare, state.checkpointed)
        return [f"memory: batch.micro {state.micro} as before"] if micro == "auto" or state.micro < micro else []
    if "auto" not in (micro, checkpointed):
        share = len(data.share(built.recipe.batch.size, 0, built.accelerator.num_processes))
        state.micro, state.checkpointed = min(micro, share), list(checkpointed)
        return []
    state.micro, state.checkpointed, words = memory_fit.fit(built, micro, checkpointed)
    return [words]


def _windows(built: Parts, run: RunFolder, state: State, sinks, stop: StopSignal) -> bool:
    recipe = built.recipe
    parts.agree_on_room(built)
    turn = _Turn(built, run, state, sinks, stop)
    if not turn.begin():
        return turn.over
    if state.window >= built.length.total:
        longer = resuming.length_key(recipe)
        sinks.say(f"already done: {state.window} of {built.length.total} windows; raise {longer} to go on")
    windows, clock = Feeder(built, state.window, state.micro), built.runner.clock
    for line in windows.said:
        sinks.say(line)
    for micro_batches, wait_seconds, failure in _timed(windows, clock):
        begun = time.perf_counter()
        sinks.phases.watch((state.window + 1) % recipe.log.every == 0 or state.window + 1 == built.length.total)
        loader = LoaderTime.of(micro_batches)
        turn.canvas_px, turn.wait_seconds = data.largest_canvas(micro_batches), wait_seconds
        micro_batches, lost = data.without_lost(micro_batches)
        if state.window in turn.other_pictures:
            state.alarms.begin_anew()
        turn.commit.back_to_best(state)
        built.optimizer.zero_grad(set_to_none=True)
        micro_batches, result = turn.run(micro_batches, failure)
        if result.failure is not None:
            raise UserError(result.failure)
        if result.abandoned:
            turn.save(state, must=True)
            sinks.say(f"stopped as asked in the middle of window {state.window + 1}, which begins anew with --resume")
            return False
        turn.account(lost, result)
        lr = set_lr(built.optimizer, parts.lr_factor(built, state))
        state.window += 1
        sinks.phases.begin("optimizer")
        with clock.section("optimizer"):
            accepted = turn.commit(state, result, micro_batches)
        sinks.phases.begin(None)
        stats = _stats(result, state, built.length, lr, accepted, time.perf_counter() - begun, wait_seconds)
        stats = replace(stats, sections=clock.take(), loader=loader, **asdict(windows.by))
        sinks.tick(stats)
        turn.judge(stats)
        if state.window % recipe.log.every == 0 or state.window == built.length.total or not result.finite:
            sinks.log(stats)
        turn.say_odd()
        goes_on = turn.after(result)
        if not goes_on or state.window == built.length.total:
            sinks.last(stats, clock.take())
        if not goes_on:
            return turn.over
        told = windows.seen(loader, stats.seconds - wait_seconds)
        if told is not None:
            sinks.say(told)
            turn.forget_waiting()
    return True


class _Turn:
    """What a turn of the loop needs beside the window itself, in the order in which it is called."""

    def __init__(self, built: Parts, run: RunFolder, state: State, sinks, stop: StopSignal) -> None:
        self.built, self.state, self.sinks, self.stop = built, state, sinks, stop
        self.validate = validation.Validation(built, sinks)
        self.save = Saver(built, run, sinks)
        self.canvas_px = (0, 0)  # of this process's part of the window in hand
        self.wait_seconds = 0.0  # for it
        self.commit = Commit(built, run, sinks, Captures(built, run.path / "captures"))
        self.alarms = monitor.build_alarms(
            built.recipe, state.alarms, len(built.splits.train), built.accelerator.device,
            cores=max(1, int(built.room.cores)),
        )
        self.account = LostImages(built, state, sinks)
        self.over = False  # early stopping ended the run
        self.other_pictures = data.changes_of_augmentation(built.recipe, len(built.splits.train))

    def begin(self) -> bool:
        """Before the first window: room on the disk, what no training will find, something to go back to, an evaluation
        that is owed."""
        state, recipe = self.state, self.built.recipe
        self.save.check_space()
        if self.alarms is not None:
            self._speak(self.alarms.begun(state.window, self.validate.beyond_limits()))
        if recipe.health.on_nonfinite == "rollback" and state.anchor is None:
            self.save(state, counted=True, must=True)
        owed = state.window > 0 and self.built.length.due(state.window, recipe.evaluate.every_epochs)
        if owed and state.evaluated_window != state.window:
            is_best = self._evaluate()
            # saved in any case: another stop before the next checkpoint would owe it, and log it, again
            self.save(state, is_best=is_best, counted=is_best or self._checkpoint_due(), must=self.validate.aborted)
        return not self.validate.aborted and not self._is_over()

    def run(self, micro_batches: list[Batch], failure: str | None) -> tuple[list[Batch], WindowResult]:
        """The window, in smaller and smaller parts for as long as memory runs out.

        Returns:
            the parts it was trained in, and what it came to.
        """
        state, built = self.state, self.built
        planned = parts.window_size(built, state.window)
        all_share = data.all_share(built.splits.train, planned, built.accelerator.num_processes)
        while True:
            requests = Requests(
                self.stop.requested, self.save.due_by_clock(), self.commit.broken, failure, lambda: self.stop.overdue,
                self.canvas_px, self.wait_seconds,
            )
            micro_batches = memory_fit.recut(micro_batches, state.micro)
            result = built.runner.run(micro_batches, all_share=all_share, planned=planned, requests=requests)
            if result.broken:
                self.commit.mend(state)
                self.commit.back_to_best(state)  # where that went back behind it
            elif result.out_of_memory:
                memory_fit.release(built.accelerator.device)
                state.health.out_of_memory += 1
                text = memory_fit.make_room(built.bare, state)
                monitor.memory.start_peak(built.accelerator.device)  # what did not fit is not what is needed now
                self.sinks.alarm("Out of memory", f"window {state.window + 1}: {text}", window=state.window + 1)
            else:
                return micro_batches, result

    def judge(self, stats: StepStats) -> None:
        """Alarms about the window: on every process, so that any of them can save what judging remembers."""
        if self.alarms is None or stats.num_images == 0:  # a window without images has no loss to judge
            return
        if stats.window % self.built.recipe.log.every == 0:
            stats.memory_fraction = monitor.memory.taken_fraction(self.built.accelerator.device)
        self._speak(self.alarms.judge(stats))

    def forget_waiting(self) -> None:
        """Windows that were made by other loader processes are no measure of the time to come."""
        if self.alarms is not None:
            self.alarms.past.machine.clear()

    def _speak(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self.sinks.alarm(alarm.title, alarm.text, level=alarm.level, window=self.state.window)

    def say_odd(self) -> None:
        """At an epoch's end, what was odd in the rows of a stream."""
        window, per_epoch = self.state.window, self.built.length.per_epoch
        if window % per_epoch == 0 or window == self.built.length.total:
            epoch = (window - 1) // per_epoch
            name = f"train, epoch {epoch + 1}"
            for line in data.odd_rows(self.built.splits.train, epoch * per_epoch, window, name):
                self.sinks.say(line)

    def after(self, result: WindowResult) -> bool:
        """Evaluation, checkpoint and stop, where they are due; returns whether to go on."""
        state, recipe, length = self.state, self.built.recipe, self.built.length
        evaluation = length.due(state.window, recipe.evaluate.every_epochs)
        counted = self._checkpoint_due()
        if not (evaluation or counted or result.save_requested or result.stop_requested):
            return True
        self.commit.settle(state)
        is_best = False
        if evaluation and not result.stop_requested:  # a stop saves first: the evaluation is owed, and due on resume
            with self.built.runner.clock.section("evaluation"), self.sinks.timed("evaluation"):
                is_best = self._validate_or_save(state)
        stopping = result.stop_requested or self.validate.aborted
        over = not stopping and self._is_over()
        if counted or is_best or result.save_requested or stopping or over:
            with self.built.runner.clock.section("checkpoint"), self.sinks.timed("checkpoint"):
                must = stopping or over or state.window == length.total
                self.save(state, is_best=is_best, counted=counted or is_best, must=must)
        if stopping:
            self.sinks.say(f"stopped as asked after window {state.window}; go on with --resume")
        return not stopping and not over

    def _is_over(self) -> bool:
        """Whether early stopping ends the run here; says so."""
        told = self.validate.over(self.state)
        if told is not None:
            self.sinks.say(told)
        self.over = told is not None
        return self.over

    def _checkpoint_due(self) -> bool:
        c = self.built.recipe.checkpoint
        return self.built.length.due(self.state.window, c.every_epochs, c.every_steps)

    def _validate_or_save(self, state: State) -> bool:
        """A broken validation image must not cost the training since the last checkpoint."""
        try:
            return self._evaluate()
        except Exception:  # on every process: evaluation refuses together
            self.save(state)
            raise

    def _evaluate(self) -> bool:
        """Returns whether it is the best so far; alarms about it are raised."""
        state = self.state
        is_best = self.validate(state, self.stop)
        if self.alarms is not None and not self.validate.aborted:
            epoch = state.window / self.built.length.per_epoch
            self._speak(self.alarms.evaluated(state.window, epoch, self.validate.numbers))
        return is_best


def _claim(run: RunFolder, resume: bool | str) -> bool:
    """Take the run folder; returns whether there is something to go on from."""
    if resume is True and not run.path.is_dir():
        raise UserError(f"there is no run {run.path} to go on with; start it without --resume, or mend its name")
    run.acquire()
    try:
        return resuming.wants_resume(run, resume)
    except UserError:
        run.release()
        raise


def _saved_split(run: Path | None) -> dict | None:
    path = None if run is None else run / "split.json"
    if path is None or not path.exists():
        return None
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(split, dict) or not {"seed", "train", "val"} <= split.keys():
            raise ValueError
    except ValueError:
        raise UserError(f"{path} is damaged: put back the copy that lies in a checkpoint of the same run") from None
    return split


def _write_start(built: Parts, run: RunFolder, state: State) -> None:
    write_atomic(run.path / "recipe.yaml", recipes.dumps(built.recipe))
    if built.splits.split_json is not None:
        write_atomic(run.path / "split.json", json.dumps(built.splits.split_json))
    run.status("running", window=state.window)


def _timed(windows: Iterator, clock: Stopwatch) -> Iterator[tuple[list[Batch], float, str | None]]:
    """Each window with the seconds spent waiting for it, or with the words why it could not be loaded: this process
    alone knows, and must not leave the others waiting."""
    while True:
        begun = time.perf_counter()
        micro_batches, failure = [], None
        try:
            with clock.section("wait"):
                micro_batches = next(windows)
        except StopIteration:
            return
        except UserError as error:
            failure = str(error)
        yield micro_batches, time.perf_counter() - begun, failure


def _stats(
    result: WindowResult, state: State, length: Length, lr: dict[str, float], accepted: bool, seconds: float,
    wait_seconds: float,
) -> StepStats:  # fmt: skip
    losses = {k: v for k, v in result.losses.items() if k != "loss"}
    counts = {
        "nonfinite": state.health.nonfinite, "rollbacks": state.health.rollbacks,
        "out_of_memory": state.health.out_of_memory,
    }  # fmt: skip
    return StepStats(
        window=state.window, step=state.step, epoch=state.window / length.per_epoch, loss=result.losses["loss"],
        losses=losses, grad_norm=result.grad_norm, grad_norms=result.grad_norms, lr=lr, num_images=result.num_images,
        num_boxes=result.num_boxes, seconds=seconds + wait_seconds, wait_seconds=result.wait_seconds, accepted=accepted,
        extra=counts, facts=result.facts, num_dropped=state.dropped,
    )  # fmt: skip
