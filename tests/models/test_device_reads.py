"""A training step waits for the device once: to solve the assignment."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from detr_accel import models


class CountReads(TorchFunctionMode):
    """Counts what would make the host wait for a device. On the CPU nothing waits, but the calls are the same."""

    READS = {
        "item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero",
        "masked_select", "unique", "equal", "allclose", "is_nonzero", "argwhere", "__contains__", "bincount",
        "repeat_interleave", "_local_scalar_dense",
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.reads = []
        self.on_host = {}  # results of .cpu(): reading those again costs nothing

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        result = func(*args, **(kwargs or {}))
        if self._is_read(name, args, kwargs or {}):
            self.reads.append(name)
        if name == "cpu":
            self.on_host[id(result)] = result
        return result

    def _is_read(self, name, args, kwargs):
        if args and id(args[0]) in self.on_host:
            return False
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
        if name == "to":
            return any(str(a) == "cpu" for a in (*args[1:], *kwargs.values()))
        if name == "where":
            return len(args) == 1
        return name in self.READS


def test_the_counter_counts():
    x = torch.arange(4.0)
    for read in (
        lambda: x[x > 1], lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.to("cpu"),
        lambda: x.nonzero(), lambda: torch.where(x > 1), lambda: float(x[0]), lambda: x.cpu().numpy(),
    ):  # fmt: skip
        with CountReads() as mode:
            read()
        assert len(mode.reads) == 1, mode.reads
    with CountReads() as mode:
        x[torch.tensor([1, 2])].float().sum()
    assert mode.reads == []


@pytest.mark.parametrize("sizes", [[2, 0, 9], [0, 0, 0]])
@pytest.mark.parametrize("parts", [[], ["backbone", "encoder", "decoder"]])
def test_one_read_of_the_device_in_a_micro_batch(make_recipe, make_batch, sizes, parts):
    recipe = make_recipe(activation_checkpointing=parts, dropout=0.1)
    model = models.build(recipe, 4, load_weights=False).train()
    criterion = models.build_criterion(recipe, 4)
    images, mask, targets = make_batch(sizes, dtype=torch.float32)
    counts = criterion.normalisers(criterion.count(targets))
    with CountReads() as mode:
        criterion(model(images, mask), targets, counts).total.backward()
    assert mode.reads == ["cpu"]


@pytest.mark.gpu
def test_one_synchronisation_on_a_gpu(make_recipe, make_batch):
    recipe = make_recipe(dropout=0.1)
    model = models.build(recipe, 4, device="cuda", load_weights=False).train()
    criterion = models.build_criterion(recipe, 4).to("cuda")
    images, mask, targets = make_batch([2, 0, 9], dtype=torch.float32)
    counts = criterion.normalisers(criterion.count(targets))
    images, mask, targets = images.cuda(), mask.cuda(), [t.to("cuda") for t in targets]
    criterion(model(images, mask), targets, counts).total.backward()  # kernels are loaded, which synchronises
    with pytest.warns(UserWarning, match="synchronizing") as caught:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            criterion(model(images, mask), targets, counts).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1
