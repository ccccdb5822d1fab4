"""``detr-accel VERB``: thin doors to functions that also work from Python. Exit code 0 yes, 1 no, 2 wrong use."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from detr_accel import recipe as recipes
from detr_accel.structures import UserError, writing


def main(argv: list[str] | None = None) -> int:
    """The console script."""
    with suppress(AttributeError, ValueError):  # a name that this console cannot show must not cost the work behind it
        sys.stdout.reconfigure(errors="backslashreplace")
    args, overrides = _parser().parse_known_args(_join_resume(sys.argv[1:] if argv is None else argv))
    return _guard(
        lambda: args.run(args, _only_overrides(overrides, allowed=args.overrides)), trains=args.verb == "train"
    )


def train_main(argv: list[str] | None = None) -> int:
    """What ``accelerate launch train.py`` runs: ``detr-accel train``."""
    return main(["train", *(sys.argv[1:] if argv is None else argv)])


def _guard(action, trains: bool = False) -> int:
    """``trains``: a reader that went away (``| head``) is no reason to call the work done."""
    try:
        code = action() or 0
    except UserError as error:
        # all processes raise the same mistake and the first one prints it, unless it is one process's own
        if int(os.environ.get("RANK", "0")) == 0 or getattr(error, "lonely", False):
            for line in str(error).splitlines():
                print(f"detr-accel: {line}", file=sys.stderr)
        return 2
    except PermissionError as error:
        words = "not this user's to read, write or enter"
        print(f"detr-accel: {error.filename}: {error.strerror}: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("detr-accel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return _training_lost_its_console() if trains else 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # everything is done; the interpreter's own flush would make it exit code 120
        _drop_stdout()
    return code


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _training_lost_its_console() -> int:
    with suppress(OSError):
        print("detr-accel: the console was closed under the training; go on with --resume", file=sys.stderr)
    return 1


def _join_resume(argv: list[str]) -> list[str]:
    """``--resume auto`` is one word to argparse, or ``--resume optim.lr=1e-5`` would lose its override."""
    joined: list[str] = []
    for word in argv:
        if word in ("auto", "yes") and joined[-1:] == ["--resume=yes"]:
            joined[-1] = f"--resume={word}"
        else:
            joined.append("--resume=yes" if word == "--resume" else word)
    return joined


def _only_overrides(rest: list[str], allowed: bool) -> list[str]:
    for text in rest:
        if not allowed or "=" not in text or text.startswith("-"):
            raise UserError(f"{text!r} is not understood" + ("; recipe keys are set as key=value" if allowed else ""))
    return rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="detr-accel", description="Train DETR-family object detectors.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run, help: str, overrides: bool = False) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        p.set_defaults(run=run, overrides=overrides)
        return p

    p = verb(
        "train", _train, "train a recipe (what train.py does); recipe keys can be set as key=value", overrides=True
    )
    p.add_argument("--recipe", default=str(recipes.folder() / "shapes.yaml"), help="YAML file (default: shapes.yaml)")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds all runs (default: runs)")
    p.add_argument(
        "--resume", choices=["yes", "auto"], default=None,
        help="go on from the last whole checkpoint of this run; auto: start or go on, whichever applies",
    )  # fmt: skip
    p.add_argument(
        "--branch", type=Path, metavar="RUN", help="begin from the last checkpoint of another run, as a run of its own"
    )
    _rehearse_options(p)

    _data_verbs(verb)

    p = verb(
        "eval", _eval, "COCO metrics of a run or checkpoint; its keys of data and evaluate, and an RT-DETR's "
        "model.num_queries and model.rtdetr.sampling, can be set as key=value",
        overrides=True,
    )  # fmt: skip
    p.add_argument("model", help="run, checkpoint, model folder, .pth or .safetensors")
    p.add_argument("--split", choices=["train", "val", "test"], help="default: val, or the only one in --data")
    p.add_argument("--data", type=Path, help="another COCO folder than the run's; classes are matched by name")
    p.add_argument(
        "--precision", default="float32", choices=["float32", "bf16", "fp16"], help="autocast as in training, or none"
    )
    p.add_argument(
        "--detections", type=Path, metavar="FILE", help="write all detections, with the data set's ids (COCO's results)"
    )
    _model_options(p)

    p = verb("predict", _predict, "boxes, names and scores in images: pictures and COCO json")
    p.add_argument("model", help="run, checkpoint, model folder, .pth or .safetensors")
    p.add_argument("images", nargs="+", help="image files or folders")
    p.add_argument("--out", type=Path, required=True, help="folder for the pictures and detections.json")
    p.add_argument("--threshold", type=float, default=None, help="least score (default: the checkpoint's best F1)")
    _model_options(p)

    p = verb(
        "plan", _plan, "memory and batch of a recipe before a run, without a GPU; recipe keys can be set as key=value",
        overrides=True,
    )  # fmt: skip
    p.add_argument("recipe", help="YAML file")
    p.add_argument("--memory", required=True, help="of one device, with its unit: 16GiB, 16GB, 16384MiB")
    p.add_argument("--devices", type=int, default=1, metavar="N", help="training processes, one a device (default: 1)")
    p.add_argument("--precision", choices=["no", "bf16", "fp16"], help="default: the recipe's, or float32")
    p.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU, unless the recipe says cpu"
    )
    p.add_argument("--json", action="store_true")

    p = verb("replay", _replay, "run a captured window that was not finite again, and say what made it fail")
    p.add_argument("capture", help="runs/NAME/captures/window-XXXXXXXX, or a run with one capture")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--json", action="store_true")

    p = verb("recipes", _recipes, "list the shipped recipes, or write the JSON schema for editors")
    p.add_argument("--schema", type=Path, metavar="FILE", help="write the JSON schema of a recipe")
    p.add_argument("--copy", metavar="NAME", help="copy a shipped recipe into this folder, to edit")
    p.add_argument("--json", action="store_true")

    p = verb(
        "convert", _convert, "between official .pth, transformers folders and this project's own, in every direction"
    )
    p.add_argument("source")
    p.add_argument("out", type=Path)
    p.add_argument("--to", choices=["ours", "official", "transformers"], default="ours")
    p.add_argument(
        "--dc5", action="store_true", default=None, help="the weights belong to a DC5 model (no file can tell)"
    )
    p.add_argument("--num-heads", type=int, metavar="N", help="attention heads, where the file cannot tell (default 8)")
    p.add_argument("--cut-head", action="store_true", help="drop the labels that no category uses (91 -> 80)")

    p = verb("fetch", _fetch, "download a hub model once, to carry to a machine without network")
    p.add_argument("hub_id", help="for example facebook/detr-resnet-101")
    p.add_argument("--out", type=Path, help="folder to copy it to (default: the hub cache)")

    p = verb("doctor", _doctor, "where the time of a recipe's training goes, or what is installed", overrides=True)
    p.add_argument("recipe", nargs="?", help="train it for a minute, keep nothing, and say what holds it up")
    p.add_argument("--seconds", type=_at_least(1.0), default=60.0, help="how long to look (default: 60)")
    p.add_argument("--apply", action="store_true", help="try the change that would help most; before and after")
    p.add_argument("--env", action="store_true", help="check the dependencies (what it does without a recipe)")
    p.add_argument("--offline", action="store_true", help="do not ask for newer releases")
    p.add_argument("--json", action="store_true")
    return parser


def _at_least(least: int | float):
    """A number of this one's type, refused below it (and where it is none, as ``nan``)."""

    def read(text: str) -> int | float:
        value = type(least)(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}")
        return value

    read.__name__ = "number"  # argparse says "invalid number value" of what is none
    return read


def _rehearse_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--rehearse", action="store_true",
        help="before a long run: check data, memory, learning, saving, resuming, W&B, disk and time in minutes, in a "
        "folder of its own; exit code 0: safe to leave, 1: not, and why",
    )  # fmt: skip
    p.add_argument("--rehearse-minutes", type=float, default=10.0, metavar="M", help="about how long (default: 10)")
    p.add_argument("--rehearsal-job", type=Path, help=argparse.SUPPRESS)  # a rehearsal's own children


def _data_verbs(verb) -> None:
    p = verb(
        "check-data", _check_data, "every record and file of a data set: what is odd, and what training does about it; "
        "or a look at what training will see",
        overrides=True,
    )  # fmt: skip
    p.add_argument(
        "data", help="a data set's folder or .parquet file, or a recipe (YAML), whose keys can then be set as key=value"
    )
    p.add_argument("--out", type=Path, metavar="FOLDER", help="also write report.html, with pictures, and report.json")
    p.add_argument("--workers", type=_at_least(0), help="processes that decode (default: one for each core, at most 8)")
    p.add_argument("--preview", type=Path, metavar="OUT.png", help="instead: a contact sheet of what training will see")
    p.add_argument("--epoch", type=int, default=0, help="of the preview; the first one is 0")
    p.add_argument("--images", type=_at_least(1), default=12, help="of the preview (default: 12)")
    p.add_argument("--json", action="store_true")

    p = verb("start", _start, "write a first recipe for a data set, each line with its reason")
    p.add_argument("folder", type=Path, help="of COCO, or of a Hugging Face data set, or a .parquet file")
    p.add_argument("--out", type=Path, help="the recipe (default: NAME.yaml here, NAME being the folder's)")
    p.add_argument("--detector", default="auto", choices=["auto", "detr", "rtdetr"], help="auto: by the data")


def _model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--decoder-layers", type=int, metavar="N", help="use only the first N decoder layers: faster, a little less AP"
    )
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--json", action="store_true")


def _train(args, overrides) -> int:
    from detr_accel.train import launch
    from detr_accel.train.loop import train

    resume = "auto" if args.resume == "auto" else args.resume == "yes"
    recipe = recipes.load(args.recipe, overrides, is_new=not resume)
    if args.rehearse or args.rehearsal_job:
        return _rehearse(args, recipe, resume)
    train(recipe, runs=args.runs, resume=resume, branch=args.branch)
    launch.leave()
    return 0


def _rehearse(args, recipe, resume) -> int:
    from detr_accel.train import launch, rehearsal

    if args.rehearsal_job:
        rehearsal.job(recipe, args.rehearsal_job, args.runs, resume)
        launch.leave()
        return 0
    if resume or args.branch:
        raise UserError("--rehearse rehearses a fresh start: leave --resume and --branch out")
    return rehearsal.main(recipe, args.runs, args.rehearse_minutes)


def _check_data(args, overrides) -> int:
    from tqdm import tqdm

    from detr_accel import data

    path = Path(args.data)
    if not path.is_dir() and not data.is_hub_file(path):
        recipe = recipes.load(args.data, overrides)
    elif overrides:
        raise UserError(f"{args.data} is a data set, and {overrides[0]} needs a recipe to belong to: give a YAML file")
    else:
        folder = {"root": args.data, "format": data.format_of(path)}
        recipe = recipes.Recipe.model_validate({"data": folder})
    if args.preview:
        print(_preview(recipe, args))
        return 0
    workers = min(8, os.cpu_count() or 1) if args.workers is None else max(0, args.workers)
    report = data.check(
        recipe, workers=0 if workers == 1 else workers,
        progress=lambda items, total: tqdm(items, "check", total, unit="image", disable=args.json or None),
    )  # fmt: skip
    if args.out:
        data.check_report.write(report, args.out, args.data)
    print(json.dumps(report.to_json(), indent=1) if args.json else data.check_report.table(report))
    if args.out and not args.json:
        print(f"wrote {args.out / 'report.html'} and report.json")
    return 0 if report.ok else 1


def _preview(recipe, args) -> str:
    from detr_accel import data, models

    model = models.build(recipe, 1, device="meta", load_weights=False)
    sheet, line = data.preview(
        recipe, data.build(recipe).train, epoch=args.epoch, images=args.images, mean=model.mean, std=model.std
    )
    with writing(args.preview, ValueError):  # a suffix that is no format
        sheet.save(args.preview)
    return f"{line}\nwrote {args.preview}"


def _start(args, _) -> int:
    import re

    import torch

    from detr_accel import data

    own = args.folder.stem if data.is_hub_file(args.folder) else args.folder.resolve().name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", args.out.stem if args.out else own).strip("-._")
    out = args.out or Path(f"{name or 'first'}.yaml")
    if out.exists():
        raise UserError(f"{out} is already there: remove it, or choose another with --out")
    text, found = data.first_recipe_for(args.folder, name or "first", args.detector, str(out))
    recipes.loads(text, str(out))
    with writing(out):
        out.write_text(text, encoding="utf-8")
    if not torch.cuda.is_available():
        small = f"recipes/rtdetr_tiny_cpu.yaml data.root={args.folder}"
        text += f"\nNo GPU is seen here, and this detector wants one. A small one for CPUs: --recipe {small}"
    print("\n".join([*found, f"wrote {out}:", "", text]))
    return 0


def _eval(args, overrides) -> int:
    from detr_accel.infer import evaluation

    metrics, said = evaluation.evaluate_checkpoint(
        args.model, split=args.split, data_folder=args.data, decoder_layers=args.decoder_layers, device=args.device,
        precision=args.precision, overrides=overrides, detections=args.detections, quiet=args.json,
    )  # fmt: skip
    print(
        json.dumps(metrics.to_json() | {"notes": said}, indent=1) if args.json else "\n".join([*said, metrics.table()])
    )
    return 0


def _predict(args, _) -> int:
    from detr_accel.infer import predict

    summary = predict.predict(
        args.model, args.images, out=args.out, threshold=args.threshold, decoder_layers=args.decoder_layers,
        device=args.device, quiet=args.json,
    )  # fmt: skip
    print(json.dumps(summary, indent=1) if args.json else "\n".join(summary["notes"]))
    return 1 if summary["skipped"] or summary["not_finite"] else 0


def _plan(args, overrides) -> int:
    from detr_accel.train import plan, plan_report

    found = plan.plan(
        recipes.load(args.recipe, overrides), plan.parse_memory(args.memory), devices=args.devices,
        precision=args.precision, device=args.device, quiet=args.json,
    )  # fmt: skip
    print(json.dumps(plan_report.to_json(found), indent=1) if args.json else "\n".join(plan_report.lines(found)))
    return 0 if found.fits else 1


def _replay(args, _) -> int:
    from detr_accel.train import replay

    report = replay.replay(args.capture, device=args.device, quiet=args.json)
    print(json.dumps(report.to_json(), indent=1) if args.json else "\n".join(report.lines()))
    return 0 if report.fails else 1


def _recipes(args, _) -> int:
    if args.schema:
        with writing(args.schema):
            args.schema.write_text(recipes.schema(), encoding="utf-8")
        print(f"wrote {args.schema}")
        return 0
    if args.copy:
        source = recipes.folder() / (args.copy.removesuffix(".yaml") + ".yaml")
        target = Path(source.name)
        if not source.exists():
            raise UserError(f"no shipped recipe {args.copy!r}; detr-accel recipes lists them")
        if target.exists():
            raise UserError(f"{target} is already here; move it away first")
        with writing(target.absolute()):
            schema = f"$schema={source.with_name('schema.json')}"  # none lies beside the copy
            text = source.read_text(encoding="utf-8").replace("$schema=schema.json", schema, 1)
            target.write_text(text, encoding="utf-8")
        print(f"wrote {target}")
        return 0
    rows = [
        {"name": p.stem, "path": str(p), "about": recipes.headline(p)} for p in sorted(recipes.folder().glob("*.yaml"))
    ]
    print(json.dumps(rows, indent=1) if args.json else "\n".join(f"{r['path']}\n    {r['about']}" for r in rows))
    return 0


def _convert(args, _) -> int:
    from detr_accel.models import convert

    loaded = convert.read(args.source, dc5=args.dc5, num_heads=args.num_heads)
    print("\n".join(convert.write(loaded, args.out, to=args.to, cut_head=args.cut_head)))
    return 0


def _fetch(args, _) -> int:
    from detr_accel.models import convert

    print(convert.fetch(args.hub_id, args.out))
    return 0


def _doctor(args, overrides) -> int:
    if args.recipe is not None and "=" not in args.recipe:
        return _doctor_recipe(args, overrides)
    if overrides or args.recipe or args.apply:
        raise UserError("detr-accel doctor needs the recipe that keys are to be set in: doctor RECIPE [key=value ...]")
    from detr_accel.monitor import environment

    report = environment.report(check_network=not args.offline)
    print(json.dumps(report.to_json(), indent=1) if args.json else report.table())
    return 0 if report.ok else 1


def _doctor_recipe(args, overrides) -> int:
    from detr_accel.train import bottleneck

    def look(more: list[str]):
        recipe = recipes.load(args.recipe, [*overrides, "log.wandb.enabled=false", *more])
        found = bottleneck.look(recipe, args.seconds, lambda line: print(line, file=sys.stderr, flush=True))
        if not args.json:
            print(found.table(), flush=True)
        return found

    before = look([])
    changes = [f"{key}={json.dumps(value)}" for key, value in before.verdict.changes.items()]
    after = look(changes) if args.apply and changes else None
    if args.json:
        print(json.dumps({"found": before.to_json(), "changes": changes, "after": after and after.to_json()}, indent=1))
    elif after is not None:
        gain = after.images_per_second / before.images_per_second
        print(
            f"with {' '.join(changes)}: {before.images_per_second:.1f} -> {after.images_per_second:.1f} images/s "
            f"({gain:.2f}x)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
