"""A plan in words and tables, and as json."""

from __future__ import annotations

from detr_accel.train import parts
from detr_accel.train.dry_step import COMPONENTS, MOMENTS
from detr_accel.train.plan import Plan

_GIB = 2**30
_WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW's two averages)",
    "ema": "averaged weights (ema)",
    "batch": "images",
    "activations/backbone": "activations: backbone",
    "activations/encoder": "activations: encoder",
    "activations/decoder": "activations: decoder",
    "activations/heads_and_losses": "activations: heads and losses",
    "backward": "backward's own, and what it computes again",
    "workspace": "workspace of reduction and optimizer",
}
_WHEN = {
    "forward": "in forward",
    "losses": "in the losses, at the end of forward",
    "backward": "in backward",
    "reduce": "while gradients are reduced",
    "optimizer": "in the optimizer's step",
    "evaluation": "in evaluation",
}


def lines(plan: Plan) -> list[str]:
    """For a person."""
    layout, peaks = plan.layout, plan.peaks
    kind = "GPU" if layout.on_gpu else "CPU process"
    precision = "float32" if layout.precision == "no" else layout.precision
    devices = f"{layout.num_devices} {kind}{'es' if kind != 'GPU' and layout.num_devices > 1 else ''}"
    devices += "s" if kind == "GPU" and layout.num_devices > 1 else ""
    size, images = plan.recipe.batch.size, plan.demands.num_images
    told = [
        f"plan: {plan.recipe.name} on {devices} of {_gib(plan.memory)}, {precision}",
        f"shapes: {_shapes(plan)}",
        parts.batch_arithmetic(size, plan.micro, layout.num_devices, images),
        f"peak: {_gib(peaks.bytes)} of {_gib(plan.usable)} {_WHEN[peaks.moment]}; {_usable(plan)}",
        "",
        *_components(plan),
        "",
        "highest by moment: " + ", ".join(f"{m} {_gib(peaks.moments[m])}" for m in MOMENTS),
    ]
    if plan.recipe.data.workers != 0:
        most = f"{plan.recipe.data.queue_gib:g} GiB of images that wait in the loader's queues"
        told.append(f"beside it, in the host's memory: at most {most} (data.queue_gib), of each process")
    if plan.levers:
        told += ["", f"what each change alone would save, with batch.micro={plan.micro}:"]
        width = max(len(x.setting) for x in plan.levers)
        told += [f"  {x.setting:<{width}}  {x.saves / _GIB:6.2f} GiB, leaving {_gib(x.peak)}" for x in plan.levers]
    return [*told, "", *_verdict(plan)]


def _shapes(plan: Plan) -> str:
    d = plan.demands
    (height, width), (eval_height, eval_width) = d.canvas_px, d.eval_canvas_px
    worst = (
        f"windows of {width}x{height} pixels, {d.most_boxes} boxes an image, evaluation of {eval_width}x{eval_height}, "
        f"{d.num_classes} classes"
    )
    if not d.assumed:
        return f"{worst}: the most that the data can bring"
    where = plan.recipe.data.root or plan.recipe.data.train_annotations
    return f"{worst}: assumed, as the worst that any images can give, because {where} is not there"


def _usable(plan: Plan) -> str:
    fraction = plan.recipe.batch.memory_fraction
    what = "CUDA and its libraries" if plan.layout.on_gpu else "Python and its libraries"
    return (
        f"usable is {fraction:g} (batch.memory_fraction) of {_gib(plan.memory)} less {_gib(plan.allowance)} for "
        f"{what}, an allowance that cannot be counted here"
    )


def _components(plan: Plan) -> list[str]:
    held = plan.peaks.components[plan.peaks.moment]
    rows = [(words, held[name]) for name, words in _WORDS.items() if held[name]]
    rest = plan.peaks.bytes - sum(size for _, size in rows)
    rows += [("other", rest)] if rest > 0 else []
    width = max(len(words) for words, _ in rows)
    return [f"  {words:<{width}}  {size / _GIB:6.2f} GiB" for words, size in rows]


def _verdict(plan: Plan) -> list[str]:
    if not plan.fits:
        return [f"does not fit, even with every lever and one image in a forward pass: {plan.remedy}"]
    size = f"the largest micro-batch that fits is {plan.largest_micro}"
    beware = [plan.beware] if plan.beware else []
    if plan.settings:
        return [f"does not fit as it is; it fits with {' '.join(plan.settings)} ({size})", *beware]
    return [f"fits as it is; {size}", *beware]


def to_json(plan: Plan) -> dict:
    """For a program. Sizes in GiB of 2**30 bytes and in pixels (h, w)."""
    demands, peaks = plan.demands, plan.peaks
    return {
        "recipe": plan.recipe.name,
        "fits": plan.fits,
        "as_it_is": plan.fits and not plan.settings,
        "settings": plan.settings,
        "remedy": plan.remedy or None,
        "beware": plan.beware or None,
        "device": "cuda" if plan.layout.on_gpu else "cpu",
        "devices": plan.layout.num_devices,
        "precision": plan.layout.precision,
        "memory_gib": plan.memory / _GIB,
        "allowance_gib": plan.allowance / _GIB,
        "usable_gib": plan.usable / _GIB,
        "batch_size": plan.recipe.batch.size,
        "micro": plan.micro,
        "accumulation": plan.accumulation,
        "largest_micro": plan.largest_micro,
        "canvas_px": list(demands.canvas_px),
        "eval_canvas_px": list(demands.eval_canvas_px),
        "most_boxes": demands.most_boxes,
        "num_classes": demands.num_classes,
        "assumed": demands.assumed,
        "peak_gib": peaks.bytes / _GIB,
        "peak_moment": peaks.moment,
        "components_gib": {c: peaks.components[peaks.moment][c] / _GIB for c in COMPONENTS},
        "moments_gib": {m: peaks.moments[m] / _GIB for m in MOMENTS},
        "levers": [{"set": x.setting, "saves_gib": x.saves / _GIB, "peak_gib": x.peak / _GIB} for x in plan.levers],
    }


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
