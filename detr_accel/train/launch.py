"""The launch guard: a run starts on the processes, the device and the precision that were asked for, or not at all.

``accelerate launch`` runs something else than was asked in several ways, all of them without an error: one process
where ``--cpu --num_processes 2`` asked for two; two processes that each believe to be alone; whatever a forgotten
``default_config.yaml`` holds. Each of them stops here, with the command that does what was meant.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from detr_accel.monitor.environment import gpu_trouble
from detr_accel.structures import UserError

CONFIG_HINT = "accelerate launch --config_file accelerate_config.yaml train.py"
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


@dataclass(frozen=True)
class Request:
    """What the launcher's own command line, and the config file that it read, asked for."""

    num_processes: int | None = None
    multi_gpu: bool = False  # --multi_gpu on the command line
    cpu: bool = False
    use_cpu_in_config: bool = False
    precision_flag: bool = False  # --mixed_precision on the command line
    threads_set: bool = False
    forgotten_config: Path | None = None  # a default config, read because no --config_file was given
    script: tuple[str, ...] = ("train.py",)


def make_accelerator(
    recipe_precision: str | None,
    device: str = "auto",
    overlap: bool = False,
    timeout_minutes: float = 30.0,
    log_with_wandb: bool = False,
    project_dir: str | Path | None = None,
) -> Accelerator:
    """An Accelerator that is what was asked for.

    Args:
        recipe_precision: "no", "bf16", "fp16", or None for the launcher's choice.
        device: "auto", or "cpu" to stay off a GPU.
        overlap: whether gradients are reduced during backward; only then do they live in the reducer's buckets.
        timeout_minutes: how long a process waits for the others.
        log_with_wandb: whether accelerate's W&B tracker is made.
        project_dir: the run folder.
    Raises:
        UserError: the launch runs something else than was asked, or asks for what this program does not do.
    """
    env, request = dict(os.environ), launcher_request()
    precision = check_before(env, request, recipe_precision=recipe_precision, device=device)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=1,
        log_with="wandb" if log_with_wandb else None,
        project_dir=None if project_dir is None else str(project_dir),
        kwargs_handlers=[
            # frozen statistics never change, and live ones are combined once a window: nothing to broadcast
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=overlap),
            InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
        ],
    )
    try:
        check_after(accelerator.num_processes, accelerator.device.type, precision, env, request)
    except UserError:
        accelerator.state.destroy_process_group()
        raise
    if accelerator.device.type == "cpu":
        _use_all_threads(request)
    return accelerator


def leave() -> None:
    """End the process group: a process that exits while gloo's threads run is now and then aborted, exit code 134."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()


def describe(accelerator: Accelerator) -> str:
    """Device, precision and processes in one line."""
    device, count = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"device {name}, precision {precision}, {count} process{'es' if count > 1 else ''}{threads}"


# --- what was asked


def launcher_request() -> Request | None:
    """What the ``accelerate launch`` above this process was asked for; None when there is none."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    launcher = _launcher_process()
    return None if launcher is None else read_request(_launch_arguments(launcher.cmdline()))


def launcher_command() -> tuple[list[str], list[str], dict[str, str]] | None:
    """The launcher's own flags, the script with its arguments, and the environment it was started in; None without."""
    launcher = _launcher_process() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    if launcher is None:
        return None
    arguments = _launch_arguments(launcher.cmdline())
    script = list(read_request(arguments).script)
    return arguments[: len(arguments) - len(script)], script, launcher.environ()


def started_by_launcher() -> bool:
    """Whether this process's own parent is ``accelerate launch``."""
    launcher = _launcher_process()
    return launcher is not None and launcher.pid == os.getppid()


def _launcher_process() -> psutil.Process | None:
    try:
        for parent in psutil.Process().parents():
            if _launch_arguments(parent.cmdline()) is not None:
                return parent
    except psutil.Error:
        pass  # another user's process, or one that has just ended: nothing can be known
    return None


def _launch_arguments(command: list[str]) -> list[str] | None:
    """The arguments behind ``accelerate launch``, however it was called; None for any other command."""
    for i, word in enumerate(command[:4]):
        follows = command[i + 1] if i + 1 < len(command) else None
        if word.endswith("accelerate/commands/launch.py") or Path(word).name == "accelerate-launch":
            return command[i + 1 :]
        if word == "-m" and follows == "accelerate.commands.launch":
            return command[i + 2 :]
        named = Path(word).name in ("accelerate", "accelerate_cli.py", "accelerate.commands.accelerate_cli")
        if named and follows == "launch":
            return command[i + 2 :]
    return None


def read_request(arguments: list[str]) -> Request:
    """Parse the launcher's arguments with its own parser, and the config file as it does."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(arguments)
    default = Path(default_config_file).expanduser()
    forgotten = default if args.config_file is None and not args.cpu and default.is_file() else None
    config = _config(args.config_file or forgotten)
    processes = args.num_processes if args.num_processes is not None else config.get("num_processes")
    return Request(
        num_processes=processes,
        multi_gpu=args.multi_gpu,
        cpu=args.cpu,
        use_cpu_in_config=bool(config.get("use_cpu")),
        precision_flag=args.mixed_precision is not None,
        threads_set=args.num_cpu_threads_per_process is not None,
        forgotten_config=forgotten,
        script=(args.training_script, *args.training_script_args),
    )


def _config(path: str | Path | None) -> dict:
    if path is None:
        return {}
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        return load_config_from_file(str(path)).to_dict()
    except (OSError, ValueError, TypeError):
        return {}  # the launcher read it before us; by now it may have changed


# --- checks before anything is built


def check_before(env: Mapping[str, str], request: Request | None, *, recipe_precision: str | None, device: str) -> str:
    """Refuse what the launcher chose and this program does not do.

    Args:
        env: the process environment.
        request: from launcher_request.
        recipe_precision: as in make_accelerator.
        device: as in make_accelerator.
    Returns: the precision to train in: "no", "bf16" or "fp16".
    Raises:
        UserError: what, where from, and the command that works.
    """
    source = _source(request)
    for key, engine in _ENGINES.items():
        if _true(env.get(key)):
            raise UserError(f"{source} chooses {engine}, which this program does not use; launch with {CONFIG_HINT}")
    dynamo = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo not in ("", "no"):
        raise UserError(f"{source} chooses torch.compile ({dynamo}), which is not supported yet; use {CONFIG_HINT}")
    steps = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, but accumulation follows from the recipe's batch.size "
            "and batch.micro; unset it"
        )
    if request and request.forgotten_config and request.use_cpu_in_config and torch.cuda.is_available():
        raise UserError(f"{source} chooses the CPU although a GPU is there; use {CONFIG_HINT}, or set device=cpu")
    precision = settle_precision(recipe_precision, env.get("ACCELERATE_MIXED_PRECISION"), request)
    if not cpu_asked(env, request, device) and (trouble := gpu_trouble(dict(env))):
        raise UserError(trouble)
    return precision


def _source(request: Request | None) -> str:
    if request and request.forgotten_config:
        return f"the default config {request.forgotten_config}, read because no --config_file was given,"
    return "the launcher"


def settle_precision(recipe: str | None, launcher: str | None, request: Request | None) -> str:
    """Precision has one owner: the recipe if it names one, else the launcher.

    A launcher's "no" counts as a choice only on its command line: it is also what it says when nobody chose.

    Args:
        recipe: the recipe's ``precision``.
        launcher: ACCELERATE_MIXED_PRECISION.
        request: from launcher_request.
    """
    launcher = (launcher or "no").lower()
    flag = bool(request and request.precision_flag)
    if launcher == "fp8":
        raise UserError("the launcher chooses fp8, which this program does not train in; use bf16, fp16 or no")
    if launcher != "no" and not flag and request and request.forgotten_config and recipe != launcher:
        raise UserError(
            f"{_source(request)} chooses precision {launcher}; use {CONFIG_HINT}, or choose it yourself with "
            f"precision={launcher}"
        )
    if recipe is None:
        return launcher
    if recipe != launcher and (flag or launcher != "no"):
        where = f"--mixed_precision {launcher}" if flag else "its config file or environment"
        raise UserError(
            f"precision is {recipe} in the recipe and {launcher} in the launcher ({where}); keep one: launch with "
            f"--mixed_precision {recipe}, or set precision={launcher} (precision=null takes the launcher's)"
        )
    return recipe


def cpu_asked(env: Mapping[str, str], request: Request | None, device: str) -> bool:
    """Whether somebody asked for the CPU: the recipe, the launcher or the environment."""
    return device == "cpu" or _true(env.get("ACCELERATE_USE_CPU")) or bool(request and request.cpu)


def _true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "on", "t")


# --- checks of what was built


def check_after(
    num_processes: int, device_type: str, precision: str, env: Mapping[str, str], request: Request | None
) -> None:
    """Compare what runs with what was asked.

    Args:
        num_processes: as the Accelerator sees it.
        device_type: "cpu", "cuda", ...
        precision: from check_before.
        env: the environment before the Accelerator was made.
        request: from launcher_request.
    Raises:
        UserError: with the right command.
    """
    world = int(env.get("WORLD_SIZE") or 1)
    asked = max(world, (request.num_processes or 1) if request else 1)
    if num_processes == 1 and world > 1:
        command = _command(world, device_type, request)
        raise UserError(f"{world} processes were started, but each of them believes to be alone; launch with {command}")
    if num_processes != asked:
        command = _command(asked, device_type, request)
        raise UserError(f"{asked} processes were asked for and {num_processes} started; launch with {command}")
    if num_processes == 1 and request and request.multi_gpu:
        command = _command(max(2, torch.cuda.device_count()), device_type, request)
        raise UserError(f"--multi_gpu alone starts one process; say how many: {command}")
    if precision == "fp16" and device_type == "cpu":
        raise UserError("precision fp16 does nothing on a CPU; use precision=bf16 or precision=no")
    if precision == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(f"precision bf16 is not supported by this GPU ({name}); use precision=fp16 or precision=no")


def _command(processes: int, device_type: str, request: Request | None) -> str:
    script = shlex.join(request.script if request else ("train.py",))
    prefix = "ACCELERATE_USE_CPU=true " if device_type == "cpu" else ""
    return f"{prefix}accelerate launch --multi_gpu --num_processes {processes} {script}"


def _use_all_threads(request: Request | None) -> None:
    """Undo the launcher's OMP_NUM_THREADS=1 when nobody asked for it: on a CPU it would halve the speed or worse."""
    launcher = _launcher_process() if request else None
    if launcher is None or request.threads_set:
        return
    try:
        if "OMP_NUM_THREADS" in launcher.environ():
            return
    except psutil.Error:
        return
    cores = min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity()))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
