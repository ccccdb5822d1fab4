"""Detectors from the Hugging Face Hub, fetched once into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from detr_accel.structures import UserError

_FILES = ["model.safetensors", "config.json", "preprocessor_config.json", "recipe.yaml", "classes.json", "meta.json"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` reads like OWNER/NAME or OWNER/NAME@REVISION, and like no path that is begun here."""
    return bool(_HUB_ID.match(source)) and not Path(source.split("/")[0]).exists()


def fetch(hub_id: str, out: str | Path | None = None) -> Path:
    """A detector's files from the Hub: from the cache, else over the network into the cache.

    Args:
        hub_id: such as ``facebook/detr-resnet-101``, optionally ``@REVISION``.
        out: a folder for a copy of the files, to be carried to a machine without network.
    Returns:
        the folder with the files.
    Raises:
        UserError: no such model, no network and not cached, or a model without safetensors.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, _, revision = hub_id.partition("@")
    copy = str(out) if out is not None else None
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES, local_dir=copy))
    except LocalEntryNotFoundError:
        raise UserError(_not_here(hub_id, constants.HF_HUB_CACHE)) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{hub_id} is neither a path here nor a model on the Hub that anyone may read") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"fetching {hub_id} failed ({str(error).splitlines()[0]}): try again later") from None
    if not (folder / "model.safetensors").is_file():
        if constants.HF_HUB_OFFLINE:
            raise UserError(_not_here(hub_id, constants.HF_HUB_CACHE))
        raise UserError(f"{hub_id} has no model.safetensors: only detectors published as safetensors can be read")
    return folder


def _not_here(hub_id: str, cache: str) -> str:
    return (
        f"{hub_id} is not in the cache ({cache}) and the Hub cannot be reached: on a machine with network run "
        f"`detr-accel fetch {hub_id} --out FOLDER`, copy FOLDER here, and set model.init_from to its path"
    )
