"""Real launches of a tiny script: each wrong one stops with the sentence, each right one runs as asked."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from detr_accel.structures import UserError
from detr_accel.train import launch
from detr_accel.train.launch import Request, check_after, check_before, settle_precision

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "accelerate_config.yaml"
SCRIPT = """
import sys
import torch
from detr_accel.structures import UserError
from detr_accel.train.launch import describe, make_accelerator

settings = dict(word.split("=") for word in sys.argv[1:])
try:
    accelerator = make_accelerator(settings.get("precision"), settings.get("device", "auto"))
except UserError as error:
    print("REFUSED", error, flush=True)
    sys.exit(2)
total = accelerator.reduce(torch.ones(1, device=accelerator.device), "sum").item()
line = f"RUN rank={accelerator.process_index} of={accelerator.num_processes} sum={total:g}"
line += f" device={accelerator.device.type} precision={accelerator.mixed_precision} threads={torch.get_num_threads()}"
sys.stdout.write(line + "\\n")  # in one piece: two ranks share the pipe
sys.stdout.flush()
accelerator.end_training()
"""
LAUNCH = "accelerate-launch"  # accelerate launch, without importing accelerate's other commands first
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU; this machine has one")


@pytest.fixture
def start(tmp_path):
    """Run a command in a folder with tiny.py; returns (exit code, its RUN and REFUSED lines)."""
    (tmp_path / "tiny.py").write_text(SCRIPT)

    def run(command: str, *, default_config: str | None = None) -> tuple[int, list[str]]:
        if default_config is not None:
            folder = tmp_path / "home" / "accelerate"
            folder.mkdir(parents=True)
            (folder / "default_config.yaml").write_text(default_config)
        paths = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_") and k != "OMP_NUM_THREADS"}
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=clean | paths | {"HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:  # a launcher that hangs leaves no children behind
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            raise
        lines = [line for line in out.splitlines() if line.startswith(("RUN", "REFUSED"))]
        assert lines, err[-3000:]
        return process.returncode, sorted(set(lines))

    return run


def two_ranks(lines: list[str]) -> bool:
    return len(lines) == 2 and all(f"rank={r} of=2 sum=2" in line for r, line in enumerate(lines))


def refusal(result: tuple[int, list[str]]) -> str:
    code, lines = result
    assert code != 0 and len(lines) == 1 and lines[0].startswith("REFUSED"), lines
    return lines[0]


# --- right launches


def test_one_process_uses_every_core_with_and_without_a_launcher(start):
    code, alone = start("python tiny.py device=cpu")
    assert code == 0 and "rank=0 of=1 sum=1 device=cpu precision=no" in alone[0]
    assert start("accelerate launch tiny.py device=cpu", default_config='distributed_type: "NO"\n') == (0, alone)
    code, lines = start(f"{LAUNCH} --num_cpu_threads_per_process 1 tiny.py device=cpu")
    assert code == 0 and lines[0].endswith("threads=1")


def test_one_process_runs_with_the_config_as_it_is(start):
    code, lines = start(f"accelerate launch --config_file {CONFIG} tiny.py device=cpu")
    assert code == 0 and len(lines) == 1 and "rank=0 of=1 sum=1 device=cpu" in lines[0]


def test_the_config_takes_num_processes_alone(start):
    options = f"--config_file {CONFIG} --num_processes 2 --main_process_port 0 --mixed_precision bf16"
    code, lines = start(f"ACCELERATE_USE_CPU=true {LAUNCH} {options} tiny.py")
    assert code == 0 and two_ranks(lines) and "precision=bf16" in lines[0]


def test_torchrun_with_the_cpu_in_the_recipe(start):
    code, lines = start("torchrun --standalone --nproc_per_node 2 tiny.py device=cpu")
    assert code == 0 and two_ranks(lines)


# --- launches that run something else than was asked


@no_gpu
def test_two_processes_that_each_believe_to_be_alone_stop(start):
    sentence = refusal(start(f"{LAUNCH} --multi_gpu --num_processes 2 --main_process_port 0 tiny.py"))
    assert "2 processes were started, but each of them believes to be alone" in sentence
    assert sentence.endswith("ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tiny.py")


def test_cpu_with_two_processes_starts_one_and_stops_with_the_command_that_starts_two(start):
    sentence = refusal(start("accelerate launch --cpu --num_processes 2 tiny.py precision=no"))
    assert "2 processes were asked for and 1 started" in sentence
    remedy = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tiny.py precision=no"
    assert sentence.endswith(remedy)
    code, lines = start(remedy.replace("accelerate launch", f"{LAUNCH} --main_process_port 0"))
    assert code == 0 and two_ranks(lines)


def test_a_multi_cpu_config_starts_one_and_stops(start, tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    sentence = refusal(start(f"{LAUNCH} --config_file {config} tiny.py"))
    assert "2 processes were asked for and 1 started" in sentence


def test_multi_gpu_without_a_number_stops(start):
    sentence = refusal(start(f"{LAUNCH} --multi_gpu --config_file {CONFIG} tiny.py device=cpu"))
    assert "--multi_gpu alone starts one process" in sentence and "--num_processes" in sentence


# --- a forgotten default config


def test_a_forgotten_default_config_may_not_choose_the_precision(start, tmp_path):
    forgotten = 'distributed_type: "NO"\nmixed_precision: bf16\n'
    sentence = refusal(start(f"{LAUNCH} tiny.py device=cpu", default_config=forgotten))
    assert f"the default config {tmp_path / 'home/accelerate/default_config.yaml'}" in sentence
    assert "precision bf16" in sentence and "--config_file accelerate_config.yaml" in sentence
    code, lines = start(f"{LAUNCH} tiny.py device=cpu precision=bf16")
    assert code == 0 and "precision=bf16" in lines[0]
    code, lines = start(f"{LAUNCH} --config_file {CONFIG} tiny.py device=cpu")
    assert code == 0 and "precision=no" in lines[0]


@pytest.mark.parametrize(
    "engine, words",
    [
        ("distributed_type: FSDP\nnum_processes: 1\nfsdp_config: {fsdp_version: 2}\n", "FSDP"),
        ('distributed_type: "NO"\ndynamo_config: {dynamo_backend: INDUCTOR}\n', "torch.compile"),
    ],
    ids=["fsdp", "dynamo"],
)
def test_a_forgotten_default_config_may_not_choose_the_engine(start, engine, words):
    sentence = refusal(start(f"{LAUNCH} --main_process_port 0 tiny.py device=cpu", default_config=engine))
    assert words in sentence and "default_config.yaml" in sentence and "--config_file" in sentence


# --- precision has one owner


@pytest.mark.parametrize(
    "recipe, launcher, flag, result",
    [
        (None, None, False, "no"),
        (None, "bf16", False, "bf16"),
        (None, "no", True, "no"),
        ("bf16", None, False, "bf16"),
        ("bf16", "no", False, "bf16"),  # nobody chose "no"
        ("bf16", "bf16", True, "bf16"),
        ("bf16", "no", True, None),
        ("no", "bf16", False, None),
        ("fp16", "bf16", True, None),
        (None, "fp8", True, None),
    ],
)
def test_precision_has_one_owner(recipe, launcher, flag, result):
    request = Request(precision_flag=flag)
    if result is not None:
        assert settle_precision(recipe, launcher, request) == result
        return
    with pytest.raises(UserError, match="precision|fp8"):
        settle_precision(recipe, launcher, request)


def test_a_precision_conflict_stops_the_launch_with_the_fix(start):
    sentence = refusal(start(f"{LAUNCH} --mixed_precision bf16 tiny.py device=cpu precision=no"))
    assert "precision is no in the recipe and bf16 in the launcher (--mixed_precision bf16)" in sentence
    assert "--mixed_precision no" in sentence and "precision=bf16" in sentence


def test_fp16_on_a_cpu_is_refused(start):
    assert "precision fp16 does nothing on a CPU" in refusal(start("python tiny.py device=cpu precision=fp16"))


# --- what the environment may not choose


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch.compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "batch.size"),
    ],
)
def test_engines_of_the_environment_are_refused(key, value, words):
    assert check_before({key: "false" if value == "true" else "no"} if "GRAD" not in key else {key: "1"}, None,
                        recipe_precision=None, device="cpu") == "no"  # fmt: skip
    with pytest.raises(UserError, match=words):
        check_before({key: value}, None, recipe_precision=None, device="cpu")


# --- a GPU that torch cannot use


@no_gpu
def test_a_gpu_that_torch_cannot_use_stops_unless_the_cpu_was_asked_for(start, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA Test 9000 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    sentence = refusal(start(f"{LAUNCH} tiny.py"))
    assert "the system has NVIDIA Test 9000, but torch cannot use it" in sentence and "device=cpu" in sentence
    for asked in ("python tiny.py device=cpu", f"{LAUNCH} --cpu tiny.py"):
        code, lines = start(asked)
        assert code == 0 and "device=cpu" in lines[0], asked


@pytest.mark.parametrize("word", ["true", "True", "1", "yes"])
def test_the_environment_can_ask_for_the_cpu(word):
    assert launch.cpu_asked({"ACCELERATE_USE_CPU": word}, None, "auto")
    assert not launch.cpu_asked({"ACCELERATE_USE_CPU": "False"}, None, "auto")


# --- what was built, in the cases that need other machines


def test_the_remedy_on_gpus_does_not_ask_for_the_cpu():
    with pytest.raises(UserError, match="launch with accelerate launch --multi_gpu --num_processes 4 train.py --x"):
        check_after(1, "cuda", "no", {}, Request(num_processes=4, script=("train.py", "--x")))


def test_processes_on_several_machines_count_together():
    check_after(8, "cuda", "no", {"WORLD_SIZE": "8"}, Request(num_processes=8))


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("/v/bin/python /v/bin/accelerate launch --cpu train.py", ["--cpu", "train.py"]),
        ("/v/bin/python /v/bin/accelerate-launch --cpu train.py", ["--cpu", "train.py"]),
        ("/v/bin/python -m accelerate.commands.launch train.py", ["train.py"]),
        ("/v/bin/python -m accelerate.commands.accelerate_cli launch train.py", ["train.py"]),
        ("python /v/site-packages/accelerate/commands/launch.py train.py", ["train.py"]),
        ("python /v/bin/accelerate config", None),
        ("bash -c run", None),
        ("vim accelerate launch.md", None),
    ],
)
def test_the_launcher_is_known_by_its_command_line(command, arguments):
    assert launch._launch_arguments(shlex.split(command)) == arguments
