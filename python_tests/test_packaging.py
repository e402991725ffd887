"""What the package says about itself, and what a wheel of it contains."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools._distutils.filelist import FileList

import pruneops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pruneops"

COLLECT = """
import json, sys, warnings
warnings.simplefilter("ignore")
from setuptools.dist import Distribution
dist = Distribution({"script_name": "setup.py"})
dist.parse_config_files()
command = dist.get_command_obj("build_py")
command.ensure_finalized()
files = [path for _, _, path in command.find_all_modules()]
for _, source, _, names in command.data_files:
    files += [f"{source}/{name}" for name in names]
json.dump({"files": files, "version": dist.get_version()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def wheel() -> dict[str, object]:
    """What setuptools puts into a wheel besides the compiled libraries, and the version it gives to it."""
    run = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=True)
    collected = json.loads(run.stdout)
    collected["files"] = {Path(name).as_posix() for name in collected["files"]}
    return collected


def test_the_version_is_written_in_one_place(wheel: dict[str, object]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pruneops.__version__)
    assert wheel["version"] == pruneops.__version__
    assert importlib.metadata.version("pruneops") == pruneops.__version__
    assert pruneops.build_info()["version"] == pruneops.__version__
    literal = f'"{pruneops.__version__}"'
    holders = [path.name for path in PACKAGE.rglob("*.py") if literal in path.read_text()]
    assert holders == ["_version.py"]
    assert literal not in (ROOT / "pyproject.toml").read_text()


def test_the_changelog_has_the_version() -> None:
    assert f"## {pruneops.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_wheel_contains_every_module_and_data_file(wheel: dict[str, object]) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    }
    assert wheel["files"] == expected
    assert "pruneops/py.typed" in expected


def test_the_shipped_model_is_in_the_wheel_with_its_card(wheel: dict[str, object]) -> None:
    names = ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "README.md")
    assert {f"pruneops/assets/scene_llava/{name}" for name in names} <= wheel["files"]


def test_a_source_distribution_contains_every_data_file() -> None:
    """Modules come by themselves, everything else from the lines of MANIFEST.in."""
    data = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".so"}
    }
    files = FileList()
    files.set_allfiles(sorted(data))
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    assert set(files.files) == data


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_metadata_names_licence_python_and_dependencies() -> None:
    metadata = importlib.metadata.metadata("pruneops")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    requires = importlib.metadata.requires("pruneops") or []
    assert {r for r in requires if "extra" not in r} == {"torch>=2.10", "numpy"}
    assert {"models", "cli", "video", "triton", "bench", "test", "lint"} <= set(metadata.get_all("Provides-Extra"))


def test_the_command_line_entry_point_is_installed() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="pruneops")
    assert entry.value == "pruneops.cli:main"
    assert callable(entry.load())


@pytest.mark.parametrize("module", ["transformers", "triton"])
def test_importing_pruneops_and_its_ops_loads_no_optional_dependency(module: str) -> None:
    code = f"import pruneops, pruneops.ops, sys; print({module!r} in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("False\n", "")


def test_the_compiled_libraries_lie_beside_the_package() -> None:
    names = {path.name for path in PACKAGE.glob("*.so")}
    assert "_C.abi3.so" in names
    assert any(name.startswith("_runtime.") for name in names)
