"""Detectors from the Hugging Face Hub, fetched once into its cache."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detr_accel.structures import UserError, check_free, first_line, writing

_FILES = ["model.safetensors", "config.json", "preprocessor_config.json", "recipe.yaml", "classes.json", "meta.json"]
_PATIENCE_SECONDS = 10.0
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` reads like OWNER/NAME or OWNER/NAME@REVISION, and like no path: not begun here, no run."""
    owner = source.split("/")[0]
    return bool(_HUB_ID.match(source)) and owner not in ("runs", "checkpoints") and not Path(owner).exists()


def fetch(hub_id: str, out: str | Path | None = None) -> Path:
    """A detector's files from the Hub: from the cache, else over the network into the cache.

    Args:
        hub_id: such as ``facebook/detr-resnet-101``, optionally ``@REVISION``.
        out: a new folder for a copy of the files, to be carried to a machine without network.
    Returns:
        the folder with the files.
    Raises:
        UserError: no such model, no network and not cached, a model without safetensors, or ``out`` is taken.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = hub_id.partition("@")
    if out is not None:
        check_free(out, or_empty=True)
    try:
        with offline_if_unreachable():
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
    except LocalEntryNotFoundError:
        raise UserError(_not_here(hub_id, constants.HF_HUB_CACHE)) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{hub_id} is neither a path here nor a model on the Hub that anyone may read") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} on the Hub has no revision {revision}: give a branch or a commit") from None
    except Exception as error:  # each transport has its own; a download that broke off goes on where it stopped
        raise UserError(f"fetching {hub_id} failed ({first_line(error)}): try again") from None
    if not (folder / "model.safetensors").is_file():
        if constants.HF_HUB_OFFLINE:
            raise UserError(_not_here(hub_id, constants.HF_HUB_CACHE))
        raise UserError(f"{hub_id} has no model.safetensors: only detectors published as safetensors can be read")
    return folder if out is None else _copied(folder, Path(out))


def _copied(folder: Path, out: Path) -> Path:
    """Into a folder that is new or empty, perhaps a mount point; the weights last, so that half a copy is none."""
    names = [name for name in reversed(_FILES) if (folder / name).is_file()]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            for name in names:
                shutil.copyfile(folder / name, out / name)  # the cache has links
        except BaseException:
            for name in names:
                (out / name).unlink(missing_ok=True)
            raise
    return out


@contextmanager
def offline_if_unreachable() -> Iterator[str | None]:
    """Ask the Hub once, quickly; where it does not answer, the cache alone is looked at, without minutes of retries.

    Yields:
        why the Hub is not to be reached; None when it answers, or when HF_HUB_OFFLINE says not to ask.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    reason = None
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE_SECONDS)
        except Exception as error:  # each transport has its own
            reason = f"{constants.ENDPOINT} does not answer: {str(error).strip() or type(error).__name__}"
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def _not_here(hub_id: str, cache: str) -> str:
    return (
        f"{hub_id} is not in the cache ({cache}) and the Hub cannot be reached: on a machine with network run "
        f"`detr-accel fetch {hub_id} --out FOLDER`, copy FOLDER here, and set model.init_from to its path"
    )
