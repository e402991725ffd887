"""Python modules import only what their layer may know; imports under TYPE_CHECKING do not count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pruneops"

# A module may import its own layer and lower ones. Folders stand for everything in them.
LAYERS = {
    "_version": 0,
    "_runtime": 0,
    "_library": 0,
    "reference": 0,
    "triton": 0,
    "backends": 1,
    "ops": 2,
    "testing": 2,
    "ragged": 3,
    "cache": 3,
    "decoder": 4,
    "methods": 5,
    "analysis": 5,
    "stand_ins": 5,
    "report": 6,
    "pruning": 6,
    "models": 7,
    "runner": 8,
    "cli": 9,
    "__main__": 9,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes_that_run(child)


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules and attributes that `path` imports, at its top or inside functions."""
    for node in nodes_that_run(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_no_higher_layer(path: Path) -> None:
    name = layer_name(path)
    if name == "__init__":
        return
    assert name in LAYERS, "a new module needs a place in LAYERS"
    wrong = []
    for target in imported(path):
        parts = target.split(".")
        if parts[0] == "pruneops" and len(parts) > 1:
            assert parts[1] in LAYERS or parts[1].startswith("__"), f"unknown module {target}"
            if LAYERS.get(parts[1], 0) > LAYERS[name]:
                wrong.append(target)
    assert not wrong


def test_package_imports_nothing_but_its_version_until_an_attribute_is_used() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert names <= {"__future__", "importlib", "typing", "pruneops._version"}


@pytest.mark.parametrize("folder", ["reference", "triton"])
def test_reference_and_triton_know_torch_only(folder: str) -> None:
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        wrong = [
            target
            for target in imported(path)
            if target.split(".")[0] in {"pruneops", "transformers", "numpy", "triton"}
            and not target.startswith((f"pruneops.{folder}", f"{folder}."))
        ]
        assert not wrong, path


def test_methods_and_analysis_stay_above_the_ops() -> None:
    for path in [*(PACKAGE / "methods").rglob("*.py"), *(PACKAGE / "analysis").rglob("*.py")]:
        assert "torch.ops" not in path.read_text(), path
        wrong = [t for t in imported(path) if t.startswith(("pruneops.reference", "pruneops.models"))]
        assert not wrong, path
