"""Backbone weights: from timm's names, from a local file, or a sentence why not."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from torch import Tensor

from detr_accel.models import hub
from detr_accel.structures import UserError

_logger = logging.getLogger(__name__)


@contextmanager
def quiet_timm() -> Iterator[None]:
    """timm warns of every tensor that features do not need (the classifier); here that is the rule."""
    builder = logging.getLogger("timm.models._builder")
    level = builder.level
    builder.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        builder.setLevel(level)


@contextmanager
def explain_missing(name: str) -> Iterator[None]:
    """Turn whatever timm, huggingface_hub or the network raise into one sentence. Never a silent random start."""
    try:
        with hub.offline_if_unreachable() as unreachable:
            yield
    except UserError:
        raise
    except Exception as error:  # each transport has its own exceptions; all mean that there are no weights
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        reason = unreachable or f"{type(error).__name__}: {reason}"
        raise UserError(
            f"the pretrained weights of backbone {name} are neither in the cache nor to be downloaded "
            f"({reason[:200]}). On a machine with network: "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" fills the cache (HF_HOME); or "
            "set model.backbone.weights to a local .pth or .safetensors file, or to none for a random start"
        ) from None


def read_for(name: str, path: str) -> dict[str, Tensor]:
    """Read a local file and fit it to the timm model ``name``: by name, by order, or through timm's own converter.

    Returns:
        state dict with the full model's names.
    Raises:
        UserError: no such file; not a weights file; tensors that do not fit.
    """
    state = _read(path)
    with torch.device("meta"):
        wanted = timm.create_model(name, pretrained=False).state_dict()
    head = _classifier_prefixes(name)
    needed = [k for k in wanted if not k.startswith(head) and not k.endswith("num_batches_tracked")]
    if all(k in state and state[k].shape == wanted[k].shape for k in needed):
        return {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}
    # a safetensors file is sorted by name: its order says nothing about the model
    by_order = None if path.endswith(".safetensors") else _match_by_order(state, wanted)
    if by_order is not None:
        _logger.warning(
            "backbone weights %s: the names are not those of timm's %s, but all %d tensors line up with the model's in "
            "order, kind and shape: matched by order",
            path,
            name,
            len(by_order),
        )
        return by_order
    if _timm_converts(name, state):
        return state
    raise UserError(_misfit(name, path, state, wanted, needed))


def _read(path: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"model.backbone.weights: no file {path}; give pretrained, none, or a .pth/.safetensors file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own words advise to run what is in the file
        raise UserError(
            f"model.backbone.weights: {path} is no file of plain tensors (it is no PyTorch file, or holds other Python "
            "objects): give a .pth of tensors or a .safetensors file"
        ) from None
    except Exception as error:  # damaged files raise whatever their bytes happen to mean
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:160]
        raise UserError(f"model.backbone.weights: {path} is no file of plain tensors ({reason})") from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # the usual envelopes
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"model.backbone.weights: {path} holds no state dict (name -> tensor)")
    return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def _classifier_prefixes(name: str) -> tuple[str, ...]:
    classifier = timm.get_pretrained_cfg(name).to_dict().get("classifier") or "head"
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(n + "." for n in names)


def _match_by_order(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Pair the lists one by one; None unless count, last name part (weight, running_mean, ...) and shape all agree."""
    theirs = [(k, v) for k, v in state.items() if not k.endswith("num_batches_tracked")]
    ours = [(k, v) for k, v in wanted.items() if not k.endswith("num_batches_tracked")]
    if len(theirs) != len(ours):
        return None
    for (their_name, their_value), (our_name, our_value) in zip(theirs, ours, strict=True):
        if their_value.shape != our_value.shape or their_name.rpartition(".")[2] != our_name.rpartition(".")[2]:
            return None
    return {ours_name: value for (ours_name, _), (_, value) in zip(ours, theirs, strict=True)}


def _timm_converts(name: str, state: dict[str, Tensor]) -> bool:
    """Whether timm's converter for this model (torchvision's or the authors' names) gives every tensor, strictly."""
    try:
        with quiet_timm():
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)})
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError, AssertionError, IndexError):
        return False
    return True


def _misfit(name: str, path: str, state: dict, wanted: dict, needed: list[str]) -> str:
    missing = [k for k in needed if k not in state]
    if missing:
        what = f"{len(missing)} of {len(needed)} tensors are missing, the first {missing[0]}"
    else:
        wrong = next(k for k in needed if state[k].shape != wanted[k].shape)
        what = f"{wrong} is {tuple(state[wrong].shape)} instead of {tuple(wanted[wrong].shape)}"
    return (
        f"model.backbone.weights: {path} does not fit backbone {name}: {what}, and its {len(state)} tensors cannot "
        "be matched by order either; give the file of this very model"
    )
