"""Weights & Biases, as people read it, through Accelerate's trackers.

Namespaces ``train/ val/ health/ speed/ memory/ data/``; every row carries its place on the three axes ``train/window``,
``train/step`` and ``train/epoch``, and W&B's own step is never given: rows whose step goes backwards would be dropped
without a word. Without an account or key the run is written to the run folder; nothing asks and nothing waits.
"""

from __future__ import annotations

import math
import netrc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from detr_accel.monitor.rows import BIGGER_IS_BETTER
from detr_accel.structures import Detections, UserError, first_line

AXES = ("train/window", "train/step", "train/epoch")
NAMESPACES = ("train", "health", "speed", "memory", "data")  # drawn over windows; val over epochs
SHOWN_SCORE = 0.3  # boxes of the panel below it are left out, the few best apart
SHOWN_AT_LEAST = 3
LONGEST_SIDE_PX = 1024  # panel images are shrunk to it
INIT_TIMEOUT_S = 30.0  # without an answer by then, the run is written offline
FINISH_TIMEOUT_S = 300.0  # what was not sent by then stays in the run folder for `wandb sync`
ALERT_PAUSE_S = 600.0  # alerts of one title closer than this are not sent again; alarms.jsonl has them all

MODEL_FILES = ("model.safetensors", "recipe.yaml", "classes.json", "meta.json")

PanelItem = tuple[np.ndarray, np.ndarray, np.ndarray, Detections, int]
"""image uint8 [H, W, 3], true boxes xyxy px [N, 4], true labels [N], detections, image id."""


def decide_mode(wanted: str) -> str:
    """``online``, ``offline`` or ``disabled``.

    WANDB_MODE and WANDB_DISABLED, where set, beat the recipe: a cluster's or a test's environment knows better.

    Args:
        wanted: auto, online or offline. ``auto``: online exactly when a key is found (WANDB_API_KEY, or the entry that
            ``wandb login`` writes).
    Raises:
        UserError: online without a key, where W&B would stop to ask for one.
    """
    told = os.environ.get("WANDB_MODE", "").strip().lower()
    if told == "disabled" or os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes"):
        return "disabled"
    if told in ("offline", "dryrun"):
        return "offline"
    if told in ("online", "run"):
        wanted = "online"
    if wanted == "auto":
        return "online" if _has_key() else "offline"
    if wanted == "online" and not _has_key():
        raise UserError(
            "W&B is asked to be online, but there is no key: run `wandb login` or set WANDB_API_KEY, or use "
            "log.wandb.mode=offline"
        )
    return wanted


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    ours = "WANDB_SERVICE" not in os.environ
    try:
        settings = wandb.setup().settings
    except Exception as error:  # pydantic's, the library's own: whatever a variable of the environment says
        raise UserError(
            f"W&B refuses its settings ({first_line(error)}): mend the WANDB_* variables of the environment, or set "
            "log.wandb.enabled=false"
        ) from None
    if ours:
        wandb.teardown()  # else every process started from here would write through the service that this one keeps
    if settings.api_key:
        return True
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    hosts = {urlsplit(settings.base_url).netloc}
    if settings.base_url == wandb.Settings.model_fields["base_url"].default:
        hosts.add("api.wandb.ai")  # older logins; the library, too, looks under both names
    for place in places:
        try:
            entries = netrc.netrc(os.path.expanduser(place)).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if any(entries[host][2] for host in hosts & entries.keys()):
            return True
    return False


def tracker_kwargs(
    *,
    name: str,
    project: str,
    folder: Path,
    mode: str,
    config: dict[str, Any],
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    run_id: str | None = None,
) -> dict[str, Any]:
    """Arguments of ``accelerator.init_trackers``.

    Args:
        folder: the run folder; W&B writes to ``wandb/`` in it.
        mode: what ``decide_mode`` said.
        config: shown as the run's configuration.
        group: keeps the parts of a resumed offline run together; the run's name when left out.
        run_id: id of the run to go on with. Only online: a second offline run with one id would replace the first when
            both are sent, so an offline run starts anew in the same group.
    """
    import wandb

    wanted = {"console": "off", "silent": True, "init_timeout": INIT_TIMEOUT_S, "finish_timeout": FINISH_TIMEOUT_S}
    known = wandb.Settings.model_fields  # older releases have no finish_timeout
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
    init: dict[str, Any] = {
        "name": name,
        "dir": str(folder.resolve()),  # a service that a parent started, a sweep's for one, stands in another folder
        "mode": mode,
        "entity": entity,
        "group": group or name,
        "tags": list(tags),
        "job_type": "train",
        "settings": settings,
    }
    if run_id is not None and mode == "online":
        init |= {"id": run_id, "resume": "allow"}
    return {"project_name": project, "config": config, "init_kwargs": {"wandb": init}}


class WandbSink:
    """One W&B run. Make it on every process, after the Accelerator was made with ``log_with="wandb"``.

    Args:
        accelerator: its trackers are started here.
        arguments: what ``tracker_kwargs`` gave.
    """

    def __init__(self, accelerator: Any, arguments: dict[str, Any]) -> None:
        self.note = _start(accelerator, arguments)
        init = arguments["init_kwargs"]["wandb"]
        self._asked: str | None = init.get("id")
        self._online = init["mode"] == "online" and not self.note.startswith(("W&B: off,", "W&B: offline"))
        self._alerted: dict[str, float] = {}
        started = accelerator.is_main_process and accelerator.trackers
        self.run = accelerator.get_tracker("wandb", unwrap=True) if started else None
        if self.run is not None:
            self._define()

    def _define(self) -> None:
        for axis in AXES:
            self.run.define_metric(axis)
        for namespace in NAMESPACES:
            self.run.define_metric(f"{namespace}/*", step_metric="train/window")
        self.run.define_metric("val/*", step_metric="train/epoch")
        for name in BIGGER_IS_BETTER:
            self.run.define_metric(f"val/{name}", step_metric="train/epoch", summary="max,last")
        self.run.define_metric("train/loss", step_metric="train/window", summary="min,last")

    @property
    def run_id(self) -> str | None:
        """What a later resume may go on with: an offline run cannot be gone on with, and leaves the one before."""
        return self.run.id if self.run is not None and self._online else self._asked

    def log(self, row: dict[str, Any]) -> None:
        """One row: numbers and their axes."""
        self.run.log(row)

    def evaluation(
        self, row: dict[str, Any], metrics: Any, panel: Sequence[PanelItem], class_names: dict[int, str]
    ) -> None:
        """One row with an evaluation's numbers, the table of classes and the panel of pictures."""
        import wandb

        table = wandb.Table(columns=["class", "AP", "objects"])
        for name, value in metrics.per_class.items():
            table.add_data(name, None if np.isnan(value) else value, metrics.num_objects.get(name))
        media: dict[str, Any] = {"val/per_class": table}
        if panel:
            media["val/panel"] = _pictures(panel, class_names)
        # an undefined number (no small objects, say) is left out: nan would draw nothing and spoil a best value
        self.run.log({k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))} | media)

    def summary(self, values: dict[str, Any]) -> None:
        self.run.summary.update(values)

    def alarm(self, title: str, text: str, level: str) -> None:
        """Send an alert, unless one of this title was sent a moment ago."""
        now = time.monotonic()
        if now - self._alerted.get(title, -math.inf) >= ALERT_PAUSE_S:
            self._alerted[title] = now
            self.run.alert(title=title[:63], text=text, level=level, wait_duration=1)

    def artifact(self, folder: Path, name: str, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """Send a model folder, without what only a resume needs. The artifact bears the run's name, never a path."""
        import wandb

        artifact = wandb.Artifact(name=f"{name}-model", type="model", metadata=metadata)
        for name in MODEL_FILES:
            if (folder / name).exists():
                artifact.add_file(str(folder / name), name=name)
        self.run.log_artifact(artifact, aliases=list(aliases))

    def close(self, ok: bool) -> None:
        # the run's own finish: accelerator.end_training would take the process group along
        if self.run is not None:
            self.run.finish(exit_code=0 if ok else 1)
            self.run = None


def _start(accelerator: Any, arguments: dict[str, Any]) -> str:
    """Start the tracker on every process; go on offline when the server cannot be reached. Returns what to tell."""
    init = arguments["init_kwargs"]["wandb"]
    offline = {k: v for k, v in init.items() if k not in ("id", "resume")} | {"mode": "offline"}
    why = ""
    for tried in (init, offline) if init["mode"] == "online" else (init,):
        try:
            accelerator.init_trackers(**(arguments | {"init_kwargs": {"wandb": tried}}))
            break
        except Exception as error:
            accelerator.trackers.clear()  # the one that failed is already in the list
            why = why or first_line(error)
    else:
        return f"W&B: off, because it could not start ({why}); the run's own files have everything"
    if why:
        return f"W&B: offline, because going online failed ({why})"
    if not accelerator.is_main_process:
        return ""
    run = accelerator.get_tracker("wandb", unwrap=True)
    if init["mode"] == "online":
        return f"W&B: {run.url}"
    where = Path(init["dir"]) / "wandb" / Path(run.dir).parent.name
    where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
    return f"W&B: offline, in {where}; `wandb sync {where}` sends it"


def _pictures(panel: Sequence[PanelItem], class_names: dict[int, str]) -> list[Any]:
    """The panel's images, shrunk where too large and padded to one size: W&B shows a list as if all had the first's."""
    from PIL import Image

    scales = [min(1.0, LONGEST_SIDE_PX / max(item[0].shape[:2])) for item in panel]
    sizes = [(round(p[0].shape[1] * s) or 1, round(p[0].shape[0] * s) or 1) for p, s in zip(panel, scales, strict=True)]
    canvas_size = (max(w for w, _ in sizes), max(h for _, h in sizes))
    pictures = []
    for item, scale, size in zip(panel, scales, sizes, strict=True):
        canvas = Image.new("RGB", canvas_size, (114, 114, 114))
        picture = Image.fromarray(item[0])
        canvas.paste(picture if picture.size == size else picture.resize(size))
        pictures.append(_picture(canvas, size, scale, item, class_names))
    return pictures


def _picture(canvas: Any, size: tuple[int, int], scale: float, item: PanelItem, class_names: dict[int, str]) -> Any:
    """One image with two layers of boxes that can be switched: ``truth`` and ``prediction``."""
    import wandb

    _, true_boxes_xyxy_px, true_labels, found, image_id = item
    enough = max(int((found.scores >= SHOWN_SCORE).sum()), min(SHOWN_AT_LEAST, len(found.scores)))
    layers = {
        "truth": _boxes(true_boxes_xyxy_px * scale, true_labels, None, class_names, size),
        "prediction": _boxes(
            found.boxes_xyxy_px[:enough] * scale, found.labels[:enough], found.scores[:enough], class_names, size
        ),
    }
    boxes = {name: {"box_data": rows, "class_labels": class_names} for name, rows in layers.items()}
    return wandb.Image(canvas, boxes=boxes, caption=f"image {image_id}", file_type="jpg")


def _boxes(
    boxes_xyxy_px: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: dict[int, str],
    size: tuple[int, int],
) -> list[dict[str, Any]]:
    rows = []
    clipped = np.clip(boxes_xyxy_px.reshape(-1, 4), 0, [size[0], size[1], size[0], size[1]])
    for i, (x0, y0, x1, y1) in enumerate(clipped.tolist()):
        name = class_names.get(int(labels[i]), str(int(labels[i])))
        row: dict[str, Any] = {
            "position": {"minX": x0, "minY": y0, "maxX": x1, "maxY": y1},
            "domain": "pixel",
            "class_id": int(labels[i]),
            "box_caption": name,
        }
        if scores is not None:
            row["scores"] = {"score": float(scores[i])}
            row["box_caption"] = f"{name} {scores[i]:.2f}"
        rows.append(row)
    return rows
