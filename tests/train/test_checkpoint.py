import json
import os
import resource

import pytest
import torch
from torch import nn

from detr_accel.structures import UserError
from detr_accel.train import checkpoint
from detr_accel.train.ema import Ema


def make():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = Ema(model, 0.9, 10)
    for _ in range(3):
        model(torch.rand(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    return model, optimizer, ema


def save(folder, window, model, optimizer, ema, best_window=None, **more):
    state = checkpoint.State(window=window, step=3, best=0.5, best_window=best_window, layout={"batch_size": 4})
    kwargs = {"files": {"recipe.yaml": "name: x\n"}, "is_best": False, **more}
    return checkpoint.save(folder, state=state, model=model, ema=ema, optimizer=optimizer, **kwargs)


@pytest.mark.law2
def test_what_is_loaded_is_bit_for_bit_what_was_saved(tmp_path):
    model, optimizer, ema = make()
    path = save(tmp_path, 7, model, optimizer, ema)
    other, other_optimizer, other_ema = make()
    with torch.no_grad():
        for p in [*other.parameters(), *other_ema.module.parameters()]:
            p.zero_()
    state = checkpoint.load(path, model=other, ema=other_ema, optimizer=other_optimizer)
    assert (state.window, state.step, state.best, other_ema.updates) == (7, 3, 0.5, 3)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ema.module.state_dict().values(), other_ema.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.rand(2, 3, 8, 8)
    for net, opt in ((model, optimizer), (other, other_optimizer)):
        net(x).square().mean().backward()
        opt.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), "the next step differs: some of the optimizer's state was lost"


def test_nothing_is_pickled(tmp_path):
    path = save(tmp_path, 1, *make())
    assert {p.suffix for p in path.iterdir()} <= {".safetensors", ".json", ".yaml"}


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "unfinished"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, harm):
    parts = make()
    save(tmp_path, 1, *parts)
    newest = save(tmp_path, 2, *parts)
    file = newest / ("manifest.json" if harm == "unfinished" else "model.safetensors")
    raw = bytearray(file.read_bytes())
    if harm == "flip":
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif harm == "cut":
        file.write_bytes(raw[:-5])
    else:
        file.unlink()
    path, notes = checkpoint.load_last(tmp_path)
    assert path.name == "window-00000001"
    assert len(notes) == 1 and "window-00000002" in notes[0] and file.name in notes[0]


def test_no_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.load_last(tmp_path)


def test_links_follow_the_newest_and_the_best_and_old_ones_go(tmp_path):
    parts = make()
    for window in range(1, 6):
        save(tmp_path, window, *parts, is_best=window == 2)
    left = sorted(p.name for p in tmp_path.glob("window-*"))
    assert left == ["window-00000002", "window-00000004", "window-00000005"]
    assert os.readlink(tmp_path / "last") == "window-00000005"
    assert os.readlink(tmp_path / "best") == "window-00000002"


def test_a_save_that_fails_leaves_the_older_ones_and_no_rubbish(tmp_path, monkeypatch):
    parts = make()
    save(tmp_path, 1, *parts)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2, *parts)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink()] == ["window-00000001"]
    assert checkpoint.damage(tmp_path / "window-00000001") is None


def test_another_model_is_refused_in_words(tmp_path):
    path = save(tmp_path, 1, *make())
    other = nn.Sequential(nn.Conv2d(3, 5, 3))
    with pytest.raises(UserError, match="another model"):
        checkpoint.load(path, model=other, ema=None, optimizer=torch.optim.AdamW(other.parameters()))


def test_manifest_covers_every_file(tmp_path):
    path = save(tmp_path, 1, *make())
    listed = set(json.loads((path / "manifest.json").read_text()))
    assert listed == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_a_disk_that_is_really_full_is_a_sentence_and_leaves_no_rubbish(tmp_path):
    """No stand-in: the system refuses bytes beyond a limit, in the middle of the weights."""
    parts = make()
    save(tmp_path, 1, *parts)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(UserError, match="window-00000002 could not be written: .*free space"):
            save(tmp_path, 2, *parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink()] == ["window-00000001"]
    assert checkpoint.load_last(tmp_path)[0].name == "window-00000001"


@pytest.mark.law2
def test_a_kill_between_the_two_renames_of_a_window_written_again_loses_nothing(tmp_path):
    path = save(tmp_path, 3, *make())
    os.replace(path, tmp_path / ".old-window-00000003")
    assert checkpoint.load_last(tmp_path)[0] == path
    assert checkpoint.damage(path) is None


@pytest.mark.law2
def test_a_kill_between_a_checkpoint_and_its_links_loses_no_best(tmp_path):
    parts = make()
    save(tmp_path, 1, *parts, is_best=True, best_window=1)
    save(tmp_path, 2, *parts, is_best=True, best_window=2)
    (tmp_path / "best").unlink()  # as it was before the last of the links
    (tmp_path / "best").symlink_to("window-00000001", target_is_directory=True)
    assert checkpoint.load_last(tmp_path)[0].name == "window-00000002"
    assert os.readlink(tmp_path / "best") == "window-00000002"
    (tmp_path / "best").unlink()
    for window in (3, 4, 5):
        save(tmp_path, window, *parts, best_window=2)
    left = sorted(p.name for p in tmp_path.glob("window-*"))
    assert left == ["window-00000002", "window-00000004", "window-00000005"]


def test_a_branch_changes_nothing_in_a_parent_that_may_still_train(tmp_path):
    parts = make()
    save(tmp_path, 1, *parts)
    save(tmp_path, 2, *parts, is_best=True, best_window=2)
    (save(tmp_path, 3, *parts, best_window=1) / "state.json").unlink()
    before = {p.name: os.readlink(p) if p.is_symlink() else None for p in tmp_path.iterdir()}
    path, notes = checkpoint.load_last(tmp_path, mend=False)
    assert path.name == "window-00000002" and "window-00000003 is passed over: " in notes[0]
    assert {p.name: os.readlink(p) if p.is_symlink() else None for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("key", ["bytes", "sha256"])
def test_a_damaged_key_of_the_manifest_is_damage(tmp_path, key):
    path = save(tmp_path, 1, *make())
    manifest = path / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"{key}"', f'"{key[:-1]}!"'))
    assert "has no size and sha256" in checkpoint.damage(path)
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.load_last(tmp_path)
