"""Evaluation inside a training run: metrics on the validation split, the best value, and the panel of pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from detr_accel import data, evaluate, models
from detr_accel.monitor.memory import says_out_of_memory
from detr_accel.structures import Batch, Detections, UserError
from detr_accel.train import lost_images, set_loss
from detr_accel.train.checkpoint import State
from detr_accel.train.parts import Parts, plateau_factor
from detr_accel.train.patience import Patience
from detr_accel.train.stopping import StopSignal


class Validation:
    """Call it to evaluate; it keeps nothing but what does not change over the run.

    Args:
        parts: the evaluated weights are the average, where there is one.
    """

    def __init__(self, parts: Parts, sinks) -> None:
        recipe, splits = parts.recipe, parts.splits
        self.recipe, self.accelerator, self.sinks, self.criterion = recipe, parts.accelerator, sinks, parts.criterion
        self.parts = parts
        self.model, self.raw = parts.evaluated, parts.bare if parts.ema is not None and recipe.evaluate.raw else None
        self.source, self.length = splits.val, parts.length
        self.to_category, _ = evaluate.match_classes(splits.train.classes, splits.val.classes)
        self.truth = splits.val.ground_truth()
        count = min(recipe.evaluate.panel_images, len(self.source)) if recipe.log.wandb.enabled else 0
        self.aborted = False
        self.named: set[int] = set()  # images that could not be read, once told
        self.numbers: dict[str, float] = {}  # of the last evaluation, beside its metrics: losses
        self.panel = [i * len(self.source) // count for i in range(count)]
        every = max(1, round(recipe.evaluate.every_epochs * self.length.per_epoch)) * recipe.batch.size
        some = set_loss.num_images(recipe.evaluate.train_images, every, len(splits.train))
        some = 0 if isinstance(splits.train, data.StreamSource) else some  # no image of a stream is there twice
        self.trained = data.Subset(splits.train, [i * len(splits.train) // some for i in range(some)])

    def __call__(self, state: State, stop: StopSignal) -> bool:
        """Evaluate, log, and note the best; returns whether this is it. The same on every process.

        A stop in the middle ends it on all processes (``aborted``): the state is as before, and the evaluation is owed.
        """
        recipe = self.recipe
        found = self._metrics(self.model, stop)
        beside = self._metrics(self.raw, stop) if found is not None and self.raw is not None else None
        known = found is not None and (self.raw is None or beside is not None)
        trained = self._train_loss(stop) if known else None
        if found is None or trained is None:
            self.aborted = True
            return False
        metrics, losses = found
        told = lost_images.words(metrics.lost.items(), self.named)
        if told:
            self.sinks.alarm("Unreadable validation images", f"{told}; left out of the evaluation", window=state.window)
        extra = {f"val/{name}": value for name, value in losses.items()}
        extra |= {f"val/train_{name}": value for name, value in trained.items() if name == "loss"}
        if beside is not None:
            extra |= {f"val/raw/{name}": value for name, value in {**beside[0].values, **beside[1]}.items()}
        self.numbers = extra
        value = metrics.values[recipe.evaluate.metric]
        # nan (nothing to score against) is never better, but the first evaluation always gives something to load
        is_best = state.metrics is None or (not math.isnan(value) and (state.best is None or value > state.best))
        state.metrics = {name: None if math.isnan(v) else v for name, v in metrics.values.items()}
        state.threshold, state.evaluated_window = metrics.threshold, state.window
        if is_best:
            state.best, state.best_window = (None if math.isnan(value) else value), state.window
        self.sinks.evaluation(
            metrics, window=state.window, step=state.step, epoch=state.window / self.length.per_epoch,
            weights="ema" if recipe.ema.enabled else "raw", panel=self._pictures(metrics.kept),
            classes=self.source.classes, extra=extra,
        )  # fmt: skip
        self._wait(state, {**metrics.values, "loss": losses.get("loss", math.nan)})
        return is_best

    def _wait(self, state: State, values: dict[str, float]) -> None:
        """Bring what early stopping and a schedule on a plateau wait for up to date."""
        early, schedule = self.recipe.early_stop, self.recipe.schedule
        if early.patience is not None:
            patience = Patience(early.metric, early.patience, early.min_delta)
            patience.note(state.early_stop, values[early.metric])
        if schedule.kind == "plateau":
            patience = Patience(schedule.metric, schedule.patience)
            patience.note(state.plateau, values[schedule.metric])
            if patience.over(state.plateau):
                before = plateau_factor(schedule, 1.0, state.plateau.drops)
                state.plateau.waited, state.plateau.drops = 0, state.plateau.drops + 1
                after = plateau_factor(schedule, 1.0, state.plateau.drops)
                if after < before:
                    self.sinks.say(
                        f"schedule: no better {schedule.metric} in {schedule.patience} evaluations: the learning rate "
                        f"is multiplied by {after / before:.3g} from window {state.window + 1} on"
                    )

    def beyond_limits(self) -> str:
        """What can never be found, in words; empty where nothing is."""
        limits = self.recipe.evaluate.max_detections, self.recipe.model.num_queries
        found = evaluate.beyond_limits(self.truth["annotations"], *limits)
        return "; ".join(f"{text}: {remedy}" for text, remedy in found)

    def over(self, state: State) -> str | None:
        """Why the run ends here, in words, where early stopping says so."""
        early = self.recipe.early_stop
        if early.patience is None or not Patience(early.metric, early.patience).over(state.early_stop):
            return None
        if state.window < early.min_epochs * self.length.per_epoch:
            return None
        best, where = state.early_stop.best, f"window {state.window}, epoch {state.window / self.length.per_epoch:.4g}"
        shown = f"{best:.4g}" if early.metric == "loss" else f"{100 * best:.1f}"
        return (
            f"stopped early after {where}: no better {early.metric} than {shown} in {state.early_stop.waited} "
            f"evaluations (early_stop.patience); checkpoints/best is the best by {self.recipe.evaluate.metric}"
        )

    def _train_loss(self, stop: StopSignal) -> dict[str, float] | None:
        """Losses on training images; None where any process was asked to stop meanwhile."""
        if not len(self.trained):
            return {}
        batches = self._batches(self.trained, keep_faults=self.recipe.data.on_bad == "stop")
        model = self.model.eval()
        return set_loss.over(batches, model, self.criterion, self.accelerator, lambda: stop.requested)

    def _batches(self, source, **keep):
        accelerator, model = self.accelerator, self.model
        return data.eval_batches(
            self.recipe, source, rank=accelerator.process_index, num_ranks=accelerator.num_processes, mean=model.mean,
            std=model.std, loading=self.parts.loading, room=self.parts.room, **keep,
        )  # fmt: skip

    def _metrics(self, model: nn.Module, stop: StopSignal) -> tuple[evaluate.Metrics, dict[str, float]] | None:
        """Metrics and losses on the validation split; None where any process was asked to stop meanwhile."""
        recipe, accelerator, total_loss = self.recipe, self.accelerator, set_loss.SetLoss(self.criterion)

        def predict(batch: Batch) -> list[Detections]:
            if stop.requested:
                raise UserError("asked to stop")
            moved = batch.to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                outputs = model(moved.images, moved.mask)
            total_loss.add(outputs, batch)
            return models.detections_of(model, outputs, batch.targets, recipe.evaluate.max_detections)

        metrics = self._scored(model, predict, stop)
        return None if metrics is None else (metrics, total_loss.result())

    def _scored(
        self, model: nn.Module, predict: Callable[[Batch], list[Detections]], stop: StopSignal
    ) -> evaluate.Metrics | None:
        recipe, accelerator = self.recipe, self.accelerator
        total = -(-len(self.source) // (recipe.evaluate.batch * accelerator.num_processes))
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                return evaluate.run(
                    predict, self.sinks.progress(self._batches(self.source), total=total), ground_truth=self.truth,
                    to_category=self.to_category, gather=gather_object, broadcast=broadcast_object_list,
                    is_main=accelerator.is_main_process, max_detections=recipe.evaluate.max_detections,
                    num_queries=recipe.model.num_queries, backend=recipe.evaluate.backend,
                    keep_images=[self.source.image_id(i) for i in self.panel],
                )  # fmt: skip
        except Exception as error:  # on every process: evaluation refuses together
            if any(gather_object([stop.requested])):
                return None
            if says_out_of_memory(f"{type(error).__name__}: {error}"):
                raise UserError(
                    f"evaluation ran out of memory: lower evaluate.batch (it is {recipe.evaluate.batch}) or "
                    "data.eval_size, then go on with --resume"
                ) from error
            raise
        finally:
            model.train(was_training)

    def _pictures(self, kept: dict[int, Detections]) -> list[tuple]:
        if not kept:  # only the main process scores
            return []
        rows = []
        for i in self.panel:
            if self.source.image_id(i) not in kept:
                continue
            try:
                sample = self.source.sample(i)
            except UserError:  # it was there a minute ago; an evaluation is worth more than a picture
                continue
            # a cache keeps the picture smaller than the file, in whose pixels all boxes are
            (h, w), of = sample.image.shape[:2], self.source.size_px(i)
            by = np.array([w / of[1], h / of[0]] * 2, np.float32)
            found = kept[sample.image_id]
            found = replace(found, boxes_xyxy_px=found.boxes_xyxy_px * by)
            rows.append((sample.image, sample.boxes_xyxy_px * by, sample.labels, found, sample.image_id))
        return rows
