"""A timm model as backbone. Legend: B batch, H W canvas, C channels of a feature map, h w its size."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import timm
import torch
from torch import Tensor, nn

from detr_accel.models import pretrained, recompute
from detr_accel.models.frozen_norm import FoldedConv2d, FrozenBatchNorm2d, fold_norms, freeze_norms
from detr_accel.structures import UserError


class Backbone(nn.Module):
    """The last feature maps of any timm model that has ``features_only``.

    Args:
        name: timm name, with or without tag.
        weights: ``pretrained``, ``none``, or the path of a local file.
        norm: ``frozen`` or ``live``; only BatchNorm is meant: LayerNorm and GroupNorm train in either case.
        frozen_stages: how many parts, counted from the stem, do not train (1 stem, 2 stem and first stage). A BatchNorm
            in them is frozen whole, statistics included.
        dc5: output stride 16, the last stage dilated as DETR-DC5's.
        fold: carry frozen norms inside their convolutions.
        checkpointing: compute blocks again in backward instead of keeping them.
        load_weights: False builds the structure alone and reads nothing.
        num_maps: how many of the model's feature maps are wanted, counted from the last.
        first_shortcut: put a convolution into the first stage's first shortcut, where a ResNet has none.
    Raises:
        UserError: unknown name; fewer maps, or strides that do not double; no stride 16; weights not to be had; no such
            shortcut.
    """

    def __init__(
        self,
        name: str,
        weights: str = "none",
        norm: str = "live",
        frozen_stages: int = 0,
        dc5: bool = False,
        fold: bool = True,
        checkpointing: bool = False,
        load_weights: bool = True,
        num_maps: int = 1,
        first_shortcut: bool = False,
    ):
        super().__init__()
        self.body, self.side_multiple = _create(name, weights if load_weights else "none", dc5, num_maps)
        if first_shortcut:
            _add_first_shortcut(self.body, name)
        self.channels: list[int] = self.body.feature_info.channels()
        self.strides: list[int] = self.body.feature_info.reduction()
        self.num_channels, self.stride = self.channels[-1], self.strides[-1]
        if any(2 * fine != coarse for fine, coarse in pairwise(self.strides)):
            raise UserError(
                f"model.backbone.name: RT-DETR reads maps of which each is half the one before, and {name} has the "
                f"strides {', '.join(map(str, self.strides))}; choose another, such as resnet50d or convnext_tiny"
            )
        if dc5 and self.stride != 16:
            raise UserError(f"model.backbone.dc5: {name} has no stride 16 (it stays at {self.stride}); use dc5: false")
        self.mean = tuple(self.body.pretrained_cfg["mean"])
        self.std = tuple(self.body.pretrained_cfg["std"])
        self.channels_axis = -1 if str(getattr(self.body, "output_fmt", "")).endswith("NHWC") else 1
        _freeze_parts(self.body, frozen_stages)
        if norm == "frozen":
            freeze_norms(self.body)
        if fold and any(isinstance(m, FrozenBatchNorm2d) for m in self.body.modules()):
            fold_norms(self.body)
        _guard_strided_convolutions(self.body)
        self.name = name
        if checkpointing:
            self.checkpoint_blocks()

    def checkpoint_blocks(self) -> None:
        """From now on compute blocks again in backward. The weights keep their names.

        Raises:
            UserError: this model has no repeated blocks.
        """
        if not any(isinstance(m, _CheckpointedBlocks) for m in self.body.modules()):
            _checkpoint_blocks(self.body, self.name)

    @property
    def has_blocks(self) -> bool:
        """Whether there is anything that ``checkpoint_blocks`` could switch on."""
        return any(_is_stage(m) or isinstance(m, _CheckpointedBlocks) for m in self.body.modules())

    @torch.no_grad()
    def num_cells(self, side_px: int) -> int:
        """Cells of all maps of a square image, found on the meta device, where nothing is computed: models round a side
        that their strides do not divide up or down."""
        there = {n: torch.empty_like(t, device="meta") for n, t in [*self.named_parameters(), *self.named_buffers()]}
        try:
            maps = torch.func.functional_call(self, there, (torch.empty(1, 3, side_px, side_px, device="meta"),))
        except NotImplementedError:  # an operation without a meta version
            return num_cells(side_px, self.strides)
        return sum(m.shape[-2] * m.shape[-1] for m in maps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> maps [B, C, h, w], finest first; h and w are rounded up where the stride does not
        divide H and W (down by some models)."""
        sides = images.shape[-2:]
        below, right = (-side % self.side_multiple for side in sides)
        if below or right:  # patches must come out even; 0 is the mean colour, as in the padding of a batch
            images = nn.functional.pad(images, (0, right, 0, below))
        # channels last: the convolutions' own layout on CPUs and tensor cores, and tokens [B, h*w, D] without a copy
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        maps = [features.movedim(self.channels_axis, 1) for features in maps]
        if below or right:  # a fine map has whole cells in what was added, and nobody's mask knows of them
            ends = [[-(-side // stride) for side in sides] for stride in self.strides]
            maps = [features[..., :h, :w] for features, (h, w) in zip(maps, ends, strict=True)]
        return maps


def num_cells(side_px: int, strides: Sequence[int]) -> int:
    """Of all feature maps of a square image whose side the strides divide."""
    return sum((-(-side_px // stride)) ** 2 for stride in strides)


def _create(name: str, weights: str, dc5: bool, num_maps: int) -> tuple[nn.Module, int]:
    """The timm model, and what the sides of its images must be multiples of."""
    _check_name(name)
    options: dict = {"features_only": True, "out_indices": tuple(range(-num_maps, 0))}
    if dc5:
        options["output_stride"] = 16
    extra, multiple = _any_image_size(name, dc5)
    options |= extra
    if weights == "none":
        return _call_timm(name, dc5, pretrained=False, **options), multiple
    if weights == "pretrained":
        with pretrained.explain_missing(name):
            return _call_timm(name, dc5, pretrained=True, **options), multiple
    state = pretrained.read_for(name, weights)
    # the state dict was checked against the model by name or by order, so that timm's lenient loading leaves no gap
    body = _call_timm(name, dc5, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **options)
    body.pretrained_cfg["state_dict"] = None
    return body, multiple


def _add_first_shortcut(body: nn.Module, name: str) -> None:
    """A 1x1 convolution and a norm in the first block's shortcut; as the identity, so that pretrained weights still
    mean what they did."""
    block = next(iter(getattr(body, "layer1", ())), None)
    if not hasattr(block, "conv1") or getattr(block, "downsample", block) is not None:
        raise UserError(
            f"model.backbone.first_shortcut: the first block of {name} has no plain shortcut; it is for resnet18d and "
            "resnet34d"
        )
    width = block.conv1.in_channels
    conv, norm = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
    with torch.no_grad():
        nn.init.dirac_(conv.weight)
        norm.running_var.sub_(norm.eps)
    block.downsample = nn.Sequential(nn.Identity(), conv, norm)


def _call_timm(name: str, dc5: bool, **options) -> nn.Module:
    try:
        with pretrained.quiet_timm():
            return timm.create_model(name, **options)
    except IndexError:
        raise UserError(
            f"model.rtdetr.num_points has {len(options['out_indices'])} numbers, and {name} has fewer feature maps: "
            "give fewer"
        ) from None
    except (NotImplementedError, AssertionError, TypeError) as error:
        remedy = "use dc5: false, or a ResNet" if dc5 else "choose one with features"
        raise UserError(f"model.backbone.name: timm cannot take features from {name} ({error}); {remedy}") from None


@cache
def _any_image_size(name: str, dc5: bool) -> tuple[dict, int]:
    """Options that make a model take images of any size, and what their sides must still be multiples of.

    Found by trying on the meta device, where nothing is computed.

    Raises:
        UserError: the model takes one size only.
    """
    options = {"features_only": True, "out_indices": (-1,)} | ({"output_stride": 16} if dc5 else {})
    with torch.device("meta"):
        body, extra = _call_timm(name, dc5, pretrained=False, **options), {}
        if any(getattr(m, "strict_img_size", False) for m in body.modules()):
            for extra in ({"dynamic_img_size": True}, {"strict_img_size": False}):
                try:
                    body = timm.create_model(name, pretrained=False, **options, **extra)
                    break
                except TypeError:
                    extra = {}
        for multiple in _SIDE_MULTIPLES:
            if _takes(body.eval(), 5 * multiple, 7 * multiple):
                return extra, 1 if multiple == _SIDE_MULTIPLES[0] else multiple
    raise UserError(
        f"model.backbone.name: {name} takes images of one size only, and a detector sees many; choose another, such as "
        "resnet50, convnext_tiny or vit_small_patch16_224"
    )


_SIDE_MULTIPLES = (13, 8, 14, 16, 32, 64)  # 13: of no patch size, so a model that takes it takes every size


def _takes(body: nn.Module, height: int, width: int) -> bool:
    """Whether a model on the meta device takes images of this size."""
    try:
        body(torch.empty(1, 3, height, width))
    except NotImplementedError:  # an operation without a meta version says nothing about sizes
        return True
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        return "meta" in str(error)
    return True


def _check_name(name: str) -> None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() has them all"
        raise UserError(f"model.backbone.name: timm knows no model {name!r}{hint}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(base + "*") if n.partition(".")[0] == base]
    if tag and tag not in tags:
        raise UserError(f"model.backbone.name: {base} has no weights {tag!r}; there are: {', '.join(tags) or 'none'}")


def _guard_strided_convolutions(body: nn.Module) -> None:
    """Keep a processor's memory whole where RepVGG and its like read images through a strided 1x1 convolution.

    oneDNN's float32 weight gradient of one writes outside its workspace when the maps are channels last and fewer than
    a vector's 16 channels (https://github.com/uxlfoundation/oneDNN/issues/6035, seen with torch 2.14.1): the process
    ends without a word, hangs, or goes on with other numbers. In the plain layout it takes another way.
    """
    for module in body.modules():
        if isinstance(module, nn.Conv2d | FoldedConv2d) and module.in_channels // module.groups < 16:
            if module.kernel_size == (1, 1) and max(module.stride) > 1:
                module.register_forward_pre_hook(_to_plain_layout)
                module.register_forward_hook(_to_channels_last)  # for all that follows


def _to_plain_layout(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (maps,) = inputs
    return (maps.contiguous() if maps.device.type == "cpu" else maps,)


def _to_channels_last(_: nn.Module, inputs: tuple[Tensor], maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _freeze_parts(body: nn.Module, num_parts: int) -> None:
    """Parts: the stem (up to stride 2), then one for each further stride that timm lists (4, 8, 16, 32)."""
    if num_parts == 0:
        return
    modules = [(name.removeprefix("model.").replace(".", "_"), m) for name, m in body.named_modules() if name]
    aliases = _STAGE_ALIASES.get(type(body).__name__, {})
    stages = [{**s, "module": aliases.get(s["module"], s["module"])} for s in body.feature_info.info]
    ends = _part_ends([n for n, _ in modules], stages)
    if not all(ends[:num_parts]):
        raise UserError(
            f"model.backbone.frozen_stages: {num_parts} parts of {type(body).__name__} cannot be told apart; use 0"
        )
    for _, module in modules if num_parts > len(ends) else modules[: ends[num_parts - 1]]:
        for parameter in module.parameters(recurse=False):  # children follow in the list, or belong to a later part
            parameter.requires_grad_(False)
    _freeze_norms_without_grad(body)


_STAGE_ALIASES = {  # where timm lists a feature under no module's name: class -> listed name -> last module of the part
    "HighResolutionNetFeatures": {"stem": "act2", "stage1": "layer1"},
}


def _part_ends(names: list[str], stages: list[dict]) -> list[int]:
    """For each part, the index in ``names`` after its last module."""

    def end(stage: dict) -> int:
        key = stage["module"].replace(".", "_")
        return max((i + 1 for i, n in enumerate(names) if n == key or n.startswith(key + "_")), default=0)

    def begin(stage: dict) -> int:
        key = stage["module"].replace(".", "_")
        return next((i for i, n in enumerate(names) if n == key or n.startswith(key + "_")), 0)

    early = [s for s in stages if s["reduction"] <= 2]
    stem = end(early[-1]) if early else begin(stages[0])
    return [stem, *(end(s) for s in stages if s["reduction"] > 2)]


def _freeze_norms_without_grad(body: nn.Module) -> None:
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.affine and not child.weight.requires_grad:
                setattr(parent, name, FrozenBatchNorm2d(child))


class _CheckpointedBlocks(nn.Sequential):
    """Blocks of which only every ``segment``-th input is kept for backward."""

    segment = 3

    def forward(self, x: Tensor) -> Tensor:
        blocks = list(self)
        if not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return super().forward(x)
        for start in range(0, len(blocks), self.segment):
            segment = blocks[start : start + self.segment]
            x = recompute.run_again(_run_blocks, segment, segment, x)
        return x


def _run_blocks(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _checkpoint_blocks(body: nn.Module, name: str) -> None:
    count = 0
    for parent in list(body.modules()):
        for key, child in list(parent.named_children()):
            if _is_stage(child):
                setattr(parent, key, _CheckpointedBlocks(OrderedDict(child.named_children())))
                count += 1
    if count == 0:
        raise UserError(
            f"model.activation_checkpointing: no repeated blocks found in {name}; leave backbone out of the list"
        )


def _is_stage(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and len(module) > 0 and all(_is_block(b) for b in module)


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, nn.Sequential) and sum("weight" in m._parameters for m in module.modules()) >= 2
