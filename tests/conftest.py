"""What holds for every test: two cores are shared, nothing is fetched, nothing is sent."""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent))  # warm.py and shared.py, for every test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
if "network" not in " ".join(sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """-m law1 replaces the default selection, so what this machine cannot run says so here."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    if item.get_closest_marker("network") and "network" not in item.config.getoption("-m"):
        pytest.skip("needs the network: pytest -m network")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed_files.add(report.nodeid.partition("::")[0])


_failed_files: set[str] = set()


@pytest.fixture(scope="module", autouse=True)
def clear_away(request, tmp_path_factory):
    """The runs of a file are gone when its tests are over, unless one of them failed: a disk is not endless."""
    base = tmp_path_factory.getbasetemp()
    before = set(base.iterdir())
    yield
    if request.node.nodeid.partition("::")[0] not in _failed_files:
        for folder in set(base.iterdir()) - before:
            shutil.rmtree(folder, ignore_errors=True)
