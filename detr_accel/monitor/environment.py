"""What is installed, against what was tested and what is needed at least; and the GPU that torch cannot use.

``setup.cfg`` and ``constraints.txt`` are read beside the package in a checkout, and from the package's own metadata
when it was installed from a wheel (the extra ``tested`` is the constraints file).
"""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

NAME = "detr-accel"
RELEASE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Declared:
    """What the project says about its dependencies."""

    python: str  # such as 3.11
    required: dict[str, Requirement]
    extras: dict[str, dict[str, Requirement]]
    tested: dict[str, str]  # canonical name -> exact version


@dataclass(frozen=True)
class Row:
    """One dependency. Versions are None where there is none."""

    name: str
    extra: str  # "" for what everybody needs
    installed: str | None
    tested: str | None
    lower: str | None
    newest: str | None
    ok: bool
    advice: str


@dataclass(frozen=True)
class Report:
    """``ok`` is False when a run could not work here; ``notes`` are whole sentences."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    ok: bool = True

    def table(self) -> str:
        """The report as text, one line for each dependency."""
        head = ("", "package", "installed", "tested", "at least", "newest", "what to do")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, "", *self.notes])

    def to_json(self) -> dict:
        """The report as plain types."""
        return asdict(self)


def report(check_network: bool = False) -> Report:
    """Compare what is installed with what was tested and what is needed.

    Args:
        check_network: also ask for newer releases, through pip and the index it is set up for; never longer than
            RELEASE_TIMEOUT_S, and without a network it says so in one note.
    """
    declared = declarations()
    groups = {"": declared.required, **{e: r for e, r in declared.extras.items() if e != "tested"}}
    names = [canonicalize_name(r.name) for group in groups.values() for r in group.values()]
    newest, network_note = _newest(names) if check_network else ({}, None)
    rows = [_row(r, extra, declared, newest) for extra, group in groups.items() for r in group.values()]
    python_ok = sys.version_info[:2] >= tuple(int(p) for p in declared.python.split("."))
    trouble = gpu_trouble()
    notes = [_python_note(declared, python_ok), _others_note(declared, names), _device_note(trouble), network_note]
    ok = all(row.ok for row in rows if not row.extra) and python_ok and trouble is None
    return Report(rows, [n for n in notes if n], ok)


def declarations() -> Declared:
    """What setup.cfg and constraints.txt (or the installed metadata) ask for."""
    root = Path(__file__).resolve().parents[2]
    if (root / "setup.cfg").is_file() and (root / "constraints.txt").is_file():
        return _from_checkout(root)
    return _from_metadata()


def _from_checkout(root: Path) -> Declared:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    options, extras = config["options"], dict(config["options.extras_require"])
    extras.pop("tested", None)
    return Declared(
        python=options["python_requires"].removeprefix(">="),
        required=_requirements(options["install_requires"].splitlines()),
        extras={name: _requirements(text.splitlines()) for name, text in extras.items()},
        tested=_pins(_requirements((root / "constraints.txt").read_text(encoding="utf-8").splitlines())),
    )


def _from_metadata() -> Declared:
    lines = importlib.metadata.requires(NAME) or []
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in lines:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        (extras.setdefault(extra.group(1), []) if extra else required).append(line)
    python = importlib.metadata.metadata(NAME)["Requires-Python"] or ">=3.11"
    tested = _pins(_requirements(extras.pop("tested", [])))
    return Declared(
        python.removeprefix(">="), _requirements(required), {e: _requirements(t) for e, t in extras.items()}, tested
    )


def _requirements(lines: Iterable[str]) -> dict[str, Requirement]:
    parsed = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    return {canonicalize_name(r.name): r for r in parsed}


def _pins(requirements: dict[str, Requirement]) -> dict[str, str]:
    return {name: next(iter(r.specifier)).version for name, r in requirements.items()}


def lower_bound(requirement: Requirement) -> str | None:
    """``2.6`` of ``torch >= 2.6``."""
    return next((s.version for s in requirement.specifier if s.operator == ">="), None)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _row(requirement: Requirement, extra: str, declared: Declared, newest: dict[str, str]) -> Row:
    name = canonicalize_name(requirement.name)
    have, tested, low, new = _installed(name), declared.tested.get(name), lower_bound(requirement), newest.get(name)
    ok, advice = judge(requirement.name, extra, have, tested, low, new)
    return Row(requirement.name, extra, have, tested, low, new, ok, advice)


def judge(
    name: str, extra: str, installed: str | None, tested: str | None, lower: str | None, newest: str | None
) -> tuple[bool, str]:
    """Whether one dependency is good enough for a run, and what to do about it in words.

    Args: as in Row; versions as text.
    """
    pinned = f"{name}=={tested}" if tested else name
    if installed is None:
        if not extra:
            return False, f"missing: pip install '{pinned}'"
        return True, f"optional: pip install '{NAME}[{extra}]'"
    have = Version(installed)
    if lower and have < Version(lower):
        return False, f"too old: pip install '{pinned}'"
    words = []
    if tested and have.public != Version(tested).public:
        side = "newer" if have > Version(tested) else "older"
        words.append(f"{side} than tested; if something breaks: pip install '{pinned}'")
    if newest and Version(newest) > max(have, Version(tested or installed)):
        words.append(f"{newest} is out: pip install '{name}=={newest}', run the tests, then note it in constraints.txt")
    return True, "; ".join(words)


def _cells(row: Row) -> tuple[str, ...]:
    name = f"{row.name} [{row.extra}]" if row.extra else row.name
    mark = "ok" if row.ok else "!!"
    return (mark, name, row.installed or "-", row.tested or "-", row.lower or "-", row.newest or "", row.advice)


def _python_note(declared: Declared, ok: bool) -> str:
    have = platform.python_version()
    if ok:
        return f"python {have} (at least {declared.python})"
    return f"python {have} is too old: at least {declared.python} is needed; make a new environment with it"


def _others_note(declared: Declared, names: list[str]) -> str | None:
    others = {n: v for n, v in declared.tested.items() if n not in names}
    differ = [f"{n} {have}" for n, v in others.items() if (have := _installed(n)) and have != v]
    if not differ:
        return None
    shown = ", ".join(differ[:8]) + (" ..." if len(differ) > 8 else "")
    return f"{len(differ)} of {len(others)} indirect packages differ from the tested set: {shown}"


def _device_note(trouble: str | None) -> str:
    import torch

    if trouble:
        return trouble
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return f"device: {names} (torch {torch.__version__}, CUDA {torch.version.cuda})"
    return f"device: CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


# --- newer releases


def _newest(names: list[str]) -> tuple[dict[str, str], str | None]:
    """Newest release of every installed name, as pip's own index has it, and a note when there was none to ask."""
    outdated = _pip_list("--outdated", names)
    if outdated is None:
        return {}, "newer releases: not known, pip is not installed here or gave no answer in time"
    if not outdated and not _pip_list("--uptodate", names[:3]):
        return {}, "newer releases: not known, no package index could be reached (offline)"
    found = {canonicalize_name(row["name"]): row["latest_version"] for row in outdated}
    listed = ", ".join(f"{n} {v}" for n, v in sorted(found.items()))
    return found, f"newer releases: {listed}" if listed else "newer releases: none"


def _pip_list(which: str, names: list[str]) -> list[dict] | None:
    wanted = set(names)
    rest = {canonicalize_name(d.name) for d in importlib.metadata.distributions() if d.name} - wanted
    command = [sys.executable, "-m", "pip", "list", which, "--format", "json", "--disable-pip-version-check"]
    command += ["--retries", "0", "--timeout", "5", *(f"--exclude={n}" for n in sorted(rest))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RELEASE_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError):
        return None


# --- the GPU that is there


def system_gpus(root: Path = Path("/")) -> list[str]:
    """NVIDIA GPUs that the system shows to this process, by name, whether torch can use them or not.

    Args:
        root: where /dev and /proc are looked for.
    """
    if not any((root / "dev").glob("nvidia[0-9]*")):
        return _nvidia_smi()
    names = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        names.append(model.group(1).strip() if model else "NVIDIA GPU")
    return names or _nvidia_smi() or ["NVIDIA GPU"]


def _nvidia_smi() -> list[str]:
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if tool is None:
        return []
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE) if done.returncode == 0 else []


def gpu_trouble(env: dict[str, str] | None = None) -> str | None:
    """One sentence when the system shows a GPU that torch cannot use, with the remedy; None when all is well.

    Args:
        env: the process environment; an empty CUDA_VISIBLE_DEVICES hides the GPUs on purpose.
    """
    import torch

    env = dict(os.environ) if env is None else env
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available() and torch.cuda.device_count() > 0:
            return None
    names = system_gpus()
    if not names:
        return None
    said = next((str(w.message).split("\n")[0] for w in caught if "CUDA" in str(w.message)), "")
    return explain_gpu(names, torch.__version__, torch.version.cuda, visible, said)


def explain_gpu(names: list[str], torch_version: str, cuda: str | None, visible: str | None, said: str) -> str:
    """The sentence for a GPU that torch cannot use.

    Args:
        cuda: CUDA version that torch was built for; None in a CPU build.
        visible: CUDA_VISIBLE_DEVICES, if set.
        said: torch's own words, if it had any.
    """
    if cuda is None:
        why = f"torch {torch_version} is a build without CUDA; install one with it: pip install --force-reinstall torch"
    elif visible is not None:
        why = f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it or name a GPU that is there"
    else:
        why = (
            f"torch {torch_version} was built for CUDA {cuda}, most likely newer than the driver; update the NVIDIA "
            "driver or install a torch built for an older CUDA"
        )
    detail = f" (torch says: {said})" if said else ""
    return f"the system has {', '.join(names)}, but torch cannot use it: {why}{detail}; or ask for the CPU: device=cpu"
