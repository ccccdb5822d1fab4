"""What the console script answers: one sentence and an exit code, whatever the disk or the reader of its output do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from detr_accel import cli
from detr_accel.structures import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("target", ["file/x.json", "/proc/nothing/x.json", "."])
def test_a_schema_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(["recipes", "--schema", target]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"detr-accel: cannot write {target}: ") and error.count("\n") == 1


def test_a_recipe_that_cannot_be_copied_is_one_sentence(monkeypatch, capsys):
    monkeypatch.chdir("/proc/self")
    assert cli.main(["recipes", "--copy", "shapes"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("detr-accel: cannot write /proc/") and error.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error_of_a_listing():
    code = "import sys; from detr_accel import cli; sys.exit(cli.main(['recipes', '--json']))"
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("trains, code, words", [(True, 1, "go on with --resume"), (False, 0, "")])
def test_a_training_that_lost_its_reader_is_not_called_done(trains, code, words):
    script = f"""
import sys
from detr_accel import cli
def action():
    print("x" * 100_000, flush=True)
sys.exit(cli._guard(action, trains={trains}))
"""
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("rank, lonely, told", [("0", False, True), ("1", False, False), ("1", True, True)])
def test_a_mistake_is_told_once_or_by_the_one_process_that_has_it(monkeypatch, capsys, rank, lonely, told):
    monkeypatch.setenv("RANK", rank)
    error = UserError("something is wrong")
    error.lonely = lonely

    def action():
        raise error

    assert cli._guard(action) == 2
    assert ("something is wrong" in capsys.readouterr().err) == told


def test_a_copied_recipe_still_knows_its_schema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "--copy", "shapes"]) == 0
    first = (tmp_path / "shapes.yaml").read_text().splitlines()[0]
    assert Path(first.partition("$schema=")[2]).is_file()


@pytest.mark.parametrize("words, found", [
    (["--resume", "yes", "a.b=1"], ["--resume=yes", "a.b=1"]), (["--resume", "auto"], ["--resume=auto"]),
    (["--resume", "a.b=1"], ["--resume=yes", "a.b=1"]), (["--resume"], ["--resume=yes"]),
])  # fmt: skip
def test_resume_may_be_followed_by_its_word(words, found):
    assert cli._join_resume(words) == found


def test_a_folder_that_may_not_be_entered_is_one_sentence(monkeypatch, capsys):
    def closed(*_):
        raise PermissionError(13, "Permission denied", "/root/x")

    monkeypatch.setattr(cli, "_recipes", closed)
    assert cli.main(["recipes"]) == 2
    said = capsys.readouterr().err
    assert said == "detr-accel: /root/x: Permission denied: not this user's to read, write or enter\n"
