"""``train`` with one thing broken in it, which FAULT names: what a rehearsal's children are started as in its tests."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace

import torch

from detr_accel import cli, models
from detr_accel.data import collate, loader
from detr_accel.train import checkpoint, validation, window

plain_build, plain_boxes, plain_write = models.build, collate.apply_boxes, checkpoint._write_weights


def dead_head():
    def build(*args, **kwargs):
        model = plain_build(*args, **kwargs)
        model.class_embed.requires_grad_(False)
        return model

    models.build = build


def cut_off_head():
    """Its weights train, and its input never reaches the loss's gradient."""

    def build(*args, **kwargs):
        model = plain_build(*args, **kwargs)
        model.bbox_embed.register_forward_hook(lambda module, inputs, output: output.detach())
        return model

    models.build = build


def box_format():
    def corners(plan, boxes, labels):
        boxes, labels = plain_boxes(plan, boxes, labels)
        return (boxes - boxes[:, [2, 3, 2, 3]] / 2 * (1, 1, 0, 0)).astype(boxes.dtype), labels

    collate.apply_boxes = corners


def shifted_labels():
    collate.apply_boxes = lambda plan, boxes, labels: (lambda b, n: (b, (n + 1) % 6))(*plain_boxes(plan, boxes, labels))


def nan_loss():
    plain = window.WindowRunner._micro_batch

    def micro_batch(self, batch, counts, share, scale):
        batch.images = torch.full_like(batch.images, float("nan"))
        return plain(self, batch, counts, share, scale)

    window.WindowRunner._micro_batch = micro_batch


def worker_dies():
    plain = loader.make_batch

    def make_batch(source, task, *more, **options):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(source, task, *more, **options)

    loader.make_batch = make_batch


def evaluation():
    def broken(*_):
        raise torch.OutOfMemoryError("injected")

    validation.models = SimpleNamespace(detections_of=broken)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def forgetful_checkpoint():
    """One that is whole by its sums, and has lost the optimizer's moments."""

    def write(folder, model, ema, optimizer):
        kept = {p: {k: v.clone() for k, v in rows.items()} for p, rows in optimizer.state.items()}
        for rows in optimizer.state.values():
            rows["exp_avg"].zero_()
        plain_write(folder, model, ema, optimizer)
        for p, rows in kept.items():
            optimizer.state[p].update(rows)

    checkpoint._write_weights = write


if __name__ == "__main__":
    globals()[os.environ["FAULT"]]()
    sys.exit(cli.train_main())
