"""Who may import whom: the layers of the package, read off the source, and what an import pulls in."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pruneops

PACKAGE = Path(pruneops.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A module may import its own layer and lower ones. Folders stand for everything in them.
LAYERS = {
    name: depth
    for depth, names in enumerate(
        (
            ("_version", "_runtime", "_library", "_triton_library", "environment", "reference", "triton"),
            ("backends",),
            ("ops", "testing"),
            ("ragged", "cache"),
            ("decoder", "media"),
            ("methods", "analysis", "stand_ins"),
            ("report", "pruning"),
            ("models", "video"),
            ("runner", "video_runner", "training", "data"),
            ("evaluation",),
            ("commands",),
            ("cli", "__main__"),
        )
    )
    for name in names
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, also inside functions, but not for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """The first component below the package: ``pruneops.ops.selection`` -> ``ops``."""
    return name.split(".")[1] if name.count(".") else ""


def files_of(*parts: str) -> list[Path]:
    return [path for path in FILES if part(module_name(path)) in parts]


def third_party(path: Path) -> set[str]:
    roots = {name.split(".")[0] for name in imports(path)}
    return roots - sys.stdlib_module_names - {"pruneops", "__future__"}


def own(path: Path) -> set[str]:
    return {part(name) for name in imports(path) if name.split(".")[0] == "pruneops"}


@pytest.mark.parametrize("path", files_of("reference", "triton"), ids=module_name)
def test_reference_and_triton_import_torch_only(path):
    assert third_party(path) <= {"torch", "triton"}
    assert own(path) <= {part(module_name(path))}


@pytest.mark.parametrize("path", files_of("reference"), ids=module_name)
def test_reference_does_not_import_triton(path):
    assert third_party(path) <= {"torch"}


@pytest.mark.parametrize("path", files_of("ops", "backends", "_library", "_triton_library", "testing"), ids=module_name)
def test_the_op_layer_knows_nothing_of_models(path):
    assert third_party(path) <= {"torch"}
    assert own(path) <= {"ops", "backends", "_library", "_runtime", "_triton_library", "reference"}


@pytest.mark.parametrize(
    "path",
    files_of("ragged", "cache", "decoder", "media", "methods", "analysis", "stand_ins", "pruning", "models"),
    ids=module_name,
)
def test_everything_above_the_ops_uses_their_front_ends(path):
    """No op is called around its checks, and no reference around the choice of a backend."""
    assert "torch.ops" not in path.read_text(encoding="utf-8").replace("torch.ops.higher_order", "")
    assert not own(path) & {"reference", "_library", "_triton_library", "triton"}


@pytest.mark.parametrize("path", files_of("ragged", "cache", "decoder", "media", "methods"), ids=module_name)
def test_host_values_reach_the_device_by_copies_that_nothing_waits_for(path):
    """`to_device` pins them; a tensor that is made from a list on the device waits until it has arrived."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor"):
            assert not any(keyword.arg == "device" for keyword in node.keywords), ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_layers_import_downwards_only(path):
    here = part(module_name(path))
    if not here:  # the package itself resolves its attributes lazily
        return
    assert here in LAYERS, "a new module needs a place in LAYERS"
    above = {name for name in own(path) if LAYERS.get(name, 0) > LAYERS[here]}
    assert not above


def test_the_package_imports_nothing_but_its_version_until_an_attribute_is_used():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert names <= {"__future__", "importlib", "typing", "pruneops._version"}


@pytest.mark.parametrize("path", files_of("analysis"), ids=module_name)
def test_analysis_does_not_know_models(path):
    assert not own(path) & {"models", "decoder", "cli"}


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return {name.split(".")[0] for name in result.stdout.split()}


@pytest.mark.parametrize("statement", ["import pruneops", "import pruneops.ops, pruneops.backends"])
def test_importing_loads_neither_triton_nor_transformers(statement):
    assert not loaded_after(statement) & {"triton", "transformers"}


# What only the reference can do: reproduce the rounding of another implementation.
REFERENCE_OPTIONS = {"dpc_knn": "exact_cdist"}


def test_reference_and_ops_offer_the_same_functions():
    import inspect

    from pruneops import backends, ops, reference

    assert set(ops.__all__) == set(reference.__all__) == {*backends.OPS, "DPCKNNResult"}
    for name in backends.OPS:
        ours, theirs = (inspect.signature(getattr(module, name)) for module in (ops, reference))
        own = REFERENCE_OPTIONS.get(name)
        theirs = theirs.replace(parameters=[p for p in theirs.parameters.values() if p.name != own])
        assert str(ours) == str(theirs), name
