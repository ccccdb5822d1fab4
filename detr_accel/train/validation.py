"""Evaluation inside a training run: metrics on the validation split, the best value, and the panel of pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from detr_accel import data, evaluate, models
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, Detections, UserError
from detr_accel.train.checkpoint import State
from detr_accel.train.stopping import StopSignal


class Validation:
    """Call it to evaluate; it keeps nothing but what does not change over the run.

    Args:
        model: the weights that are evaluated: the average, or the bare model.
    """

    def __init__(self, recipe: Recipe, splits, accelerator: Accelerator, model: nn.Module, sinks) -> None:
        self.recipe, self.accelerator, self.model, self.sinks = recipe, accelerator, model, sinks
        self.source = splits.val
        self.to_category, _ = evaluate.match_classes(splits.train.classes, splits.val.classes)
        self.truth = splits.val.ground_truth()
        count = min(recipe.evaluate.panel_images, len(self.source)) if recipe.log.wandb.enabled else 0
        self.aborted = False
        self.panel = [i * len(self.source) // count for i in range(count)]

    def __call__(self, state: State, length, stop: StopSignal) -> bool:
        """Evaluate, log, and note the best; returns whether this is it. The same on every process.

        A stop in the middle ends it on all processes (``aborted``): the state is as before, and the evaluation is owed.
        """
        recipe, accelerator = self.recipe, self.accelerator

        def predict(batch: Batch) -> list[Detections]:
            if stop.requested:
                raise UserError("asked to stop")
            batch = batch.to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                outputs = self.model(batch.images, batch.mask)
            sizes = torch.tensor([t.orig_size_px for t in batch.targets])
            return models.detections(
                outputs, [t.image_id for t in batch.targets], sizes, recipe.evaluate.max_detections
            )

        metrics = self._metrics(predict, stop)
        if metrics is None:
            self.aborted = True
            return False
        value = metrics.values[recipe.evaluate.metric]
        # nan (nothing to score against) is never better, but the first evaluation always gives something to load
        is_best = state.metrics is None or (not math.isnan(value) and (state.best is None or value > state.best))
        state.metrics = {name: None if math.isnan(v) else v for name, v in metrics.values.items()}
        state.threshold, state.evaluated_window = metrics.threshold, state.window
        if is_best:
            state.best, state.best_window = (None if math.isnan(value) else value), state.window
        self.sinks.evaluation(
            metrics, window=state.window, step=state.step, epoch=state.window / length.per_epoch,
            weights="ema" if recipe.ema.enabled else "raw", panel=self._pictures(metrics.kept),
            classes=self.source.classes,
        )  # fmt: skip
        return is_best

    def _metrics(self, predict: Callable[[Batch], list[Detections]], stop: StopSignal) -> evaluate.Metrics | None:
        """None where any process was asked to stop before the numbers were there."""
        recipe, accelerator = self.recipe, self.accelerator
        rank, num_ranks = accelerator.process_index, accelerator.num_processes
        batches = data.eval_batches(
            recipe, self.source, rank=rank, num_ranks=num_ranks, mean=self.model.mean, std=self.model.std
        )
        total = -(-len(self.source) // (recipe.evaluate.batch * num_ranks))
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                return evaluate.run(
                    predict, self.sinks.progress(batches, total=total), ground_truth=self.truth,
                    to_category=self.to_category, gather=gather_object, broadcast=broadcast_object_list,
                    is_main=accelerator.is_main_process, max_detections=recipe.evaluate.max_detections,
                    backend=recipe.evaluate.backend, keep_images=[self.source.image_id(i) for i in self.panel],
                )  # fmt: skip
        except Exception as error:  # on every process: evaluation refuses together
            if any(gather_object([stop.requested])):
                return None
            told = f"{type(error).__name__} {error}".lower().replace(" ", "")
            if "outofmemory" in told:
                raise UserError(
                    f"evaluation ran out of memory: lower evaluate.batch (it is {recipe.evaluate.batch}) or "
                    "data.eval_size, then go on with --resume"
                ) from error
            raise
        finally:
            self.model.train(was_training)

    def _pictures(self, kept: dict[int, Detections]) -> list[tuple]:
        if not kept:  # only the main process scores
            return []
        rows = []
        for i in self.panel:
            sample = self.source.sample(i)
            rows.append((sample.image, sample.boxes_xyxy_px, sample.labels, kept[sample.image_id], sample.image_id))
        return rows
