"""The arrows of the house, read from the source: who may import whom, and how long a function may be."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "detr_accel").rglob("*.py"))
FLOORS = [
    {"structures", "boxes", "recipe", "recipe_augment", "recipe_parts", "recipe_model", "host"},
    {"data", "models", "evaluate", "monitor"},
    {"train", "infer"},
    {"cli"},
]
HEAVY = {"wandb", "datasets", "transformers", "matplotlib", "onnx", "onnxruntime", "openvino", "pycocotools", "hotcoco"}


def room(path: Path) -> str:
    """``models`` for detr_accel/models/detr.py, ``recipe`` for detr_accel/recipe.py."""
    return path.relative_to(ROOT / "detr_accel").parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {dotted(p) for p in FILES}


def imports(tree: ast.AST, top_only: bool = False) -> list[str]:
    """Dotted names of imported modules; of ``from package import module`` the module."""
    found: list[str] = []
    for node in _top(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append(whole if whole in MODULES else node.module)
    return found


def _top(tree: ast.AST):
    """Statements that run at import: also inside if and try, not inside functions, not under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top(node)


def wrong_arrow(importer: str, imported: str) -> str | None:
    """Why one room may not import another; None where it may."""
    floor_of = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    if imported in ("", importer):
        return None
    above, below = floor_of[importer], floor_of[imported]
    if below > above:
        return f"{importer} (floor {above + 1}) imports {imported} (floor {below + 1}): arrows point downwards only"
    if below == above and above > 0:
        return f"{importer} and {imported} live on one floor and do not know each other"
    return None


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_room_has_its_floor():
    rooms = {room(p) for p in FILES} - {"__init__", "__main__"}
    assert rooms <= set().union(*FLOORS), f"no floor for {rooms - set().union(*FLOORS)}"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_arrows_point_downwards_only(path):
    if room(path) in ("__init__", "__main__"):
        return
    inner = [n.split(".")[1] for n in imports(parsed(path)) if n.startswith("detr_accel.")]
    wrong = [why for name in inner if (why := wrong_arrow(room(path), name))]
    assert not wrong, f"{path.relative_to(ROOT)}: {'; '.join(wrong)}"


@pytest.mark.parametrize(
    "importer, imported, allowed",
    [
        ("train", "models", True),
        ("cli", "train", True),
        ("models", "boxes", True),
        ("models", "models", True),
        ("models", "data", False),
        ("train", "infer", False),
        ("monitor", "train", False),
        ("recipe", "data", False),
    ],
)
def test_the_rule_itself(importer, imported, allowed):
    assert (wrong_arrow(importer, imported) is None) == allowed


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_heavy_packages_are_imported_where_they_are_used(path):
    heavy = {n.split(".")[0] for n in imports(parsed(path), top_only=True)} & HEAVY
    assert not heavy, f"{path.relative_to(ROOT)}: import {', '.join(heavy)} inside the function that uses it"


def test_no_import_circle():
    graph = {dotted(p): {n for n in imports(parsed(p), top_only=True) if n in MODULES} for p in FILES}
    # ``from detr_accel.models import weights`` inside detr_accel.models is an arrow to weights, not to the package
    graph = {name: {n for n in names if n != name} for name, names in graph.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("import circle: " + " -> ".join(error.args[1]))


# sizes.py is a part of the builder of data; the others read and write the recipe beside weights, or for foreign ones
FOREIGN = ("architecture.py", "rtdetr_architecture.py", "rtdetr_official.py")
BUILDERS = ("__init__.py", "sizes.py", "convert.py", "weights.py", *FOREIGN)


def test_only_builders_and_the_loop_see_a_recipe():
    for path in FILES:
        if room(path) not in FLOORS[1] or path.name in BUILDERS:
            continue
        seen = "detr_accel.recipe" in imports(parsed(path))
        assert not seen, f"{path.relative_to(ROOT)}: only the wing's builder unpacks a recipe"


def test_functions_are_short():
    lengths = {
        f"{p.relative_to(ROOT)}:{n.lineno} {n.name}": n.end_lineno - n.lineno + 1
        for p in FILES
        for n in ast.walk(parsed(p))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > 100} == {}
    long = {name: n for name, n in lengths.items() if n >= 35}
    assert len(long) <= 0.1 * len(lengths), f"more than one function in ten has 35 lines or more: {long}"


def test_files_are_readable_in_one_sitting():
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    # recipe.py is a list of knobs with their meanings: looked up, not read through
    assert [p for p, n in lengths.items() if n > (700 if p.name == "recipe.py" else 450)] == []


def test_ruff_is_content():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
