"""``pruneops schedule``: the published schedule, layer by layer, and what it costs."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from golden_support import Golden

from pruneops.analysis import TextShape, kv_bytes_per_token, layer_flops
from pruneops.cli import BAD_INPUT, OK, main

SEVEN_B = TextShape(4096, 11008, 32, 32, 32, 128, 1)
SCHEDULES = {
    "default": "shiftedcos_decay_0.85_0.15",
    "cos_075_025": "shiftedcos_decay_0.75_0.25",
    "lin": "shiftedlinear_decay_0.85_0.15",
}


def schedule(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["schedule", "pmod", "--json", *map(str, arguments)]) == OK
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("tokens", [576, 2880, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ratios_and_counts_are_those_of_the_official_code(
    name: str, tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Golden("pmod_prd_table")
    layers = schedule(capsys, "--layers", 32, "--schedule", SCHEDULES[name], "--image-tokens", tokens)["layers"]
    np.testing.assert_array_equal([layer["keep_ratio"] for layer in layers], table[f"{name}_effective"])
    np.testing.assert_array_equal([layer["image_tokens"] for layer in layers], table[f"{name}_k{tokens}"])
    np.testing.assert_array_equal([layer["mod"] for layer in layers], table[f"{name}_effective"] < 1)


def test_the_mean_is_the_published_538_percent(capsys: pytest.CaptureFixture[str]) -> None:
    document = schedule(capsys, "--layers", 32)
    assert round(100 * document["mean_keep_ratio"], 3) == 53.75
    # Whole tokens: what the cache really holds.
    assert round(100 * document["kv_bytes"] / document["dense_kv_bytes"], 1) == 53.7
    assert main(["schedule", "pmod", "--layers", "32"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[:4] == ["of", "dense", "53.75", "%"]
    assert lines[10].split() == ["8", "MoD", "0.844483", "486", "486", "198.65", "7.963"]


def test_costs_are_those_of_the_tokens_and_of_the_routers(capsys: pytest.CaptureFixture[str]) -> None:
    document = schedule(capsys, "--layers", 32, "--image-tokens", 100, "--text-tokens", 20, "--dtype", "float32")
    for layer in document["layers"]:
        router = 2 * 4096 * 100 if layer["mod"] else 0
        assert layer["tokens"] == layer["image_tokens"] + 20
        assert layer["flops"] == layer_flops(SEVEN_B, layer["tokens"]) + router
        assert layer["kv_bytes"] == layer["tokens"] * kv_bytes_per_token(SEVEN_B, "float32")
    assert document["dense_flops"] == 32 * layer_flops(SEVEN_B, 120)
    assert document["dense_kv_bytes"] == 32 * 120 * kv_bytes_per_token(SEVEN_B, "float32")
    for key in ("flops", "kv_bytes"):
        assert document[key] == sum(layer[key] for layer in document["layers"])


def test_sizes_of_the_model_are_taken_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", 64, "--intermediate", 96, "--heads", 4, "--kv-heads", 2, "--layers", 4]
    document = schedule(capsys, *sizes, "--schedule", "interleave", "--router-factor", 0.34)
    shape = TextShape(64, 96, 4, 4, 2, 16, 1)
    assert [layer["keep_ratio"] for layer in document["layers"]] == [1.0, 0.34, 1.0, 0.34]
    assert document["layers"][0]["flops"] == layer_flops(shape, 576)
    assert document["layers"][0]["kv_bytes"] == 576 * 2 * 2 * 16 * 2


def test_parity_takes_the_depth_of_the_official_code(capsys: pytest.CaptureFixture[str]) -> None:
    ours, official = (schedule(capsys, "--layers", 40, *extra)["layers"] for extra in ([], ["--parity"]))
    assert ours[39]["keep_ratio"] == 0.15 and official[39]["keep_ratio"] > 0.15
    assert sum(layer["mod"] for layer in ours) != sum(layer["mod"] for layer in official)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "deep"], "layers: got 'deep'"),
        (["--schedule", "shiftedcos_decay_0.15_0.85"], "0.15"),
        (["--router-factor", "0"], "router_factor: got 0.0"),
        (["--dtype", "four"], "dtype must be a floating point type"),
        (["--heads", "3"], "--hidden: got 4096, expected a multiple of --heads (3)"),
        (["--layers", "8", "--parity"], "none of the model's 8 layers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "pmod", "--layers", "32", *arguments]) == BAD_INPUT
    err = capsys.readouterr().err
    assert message in err and err.startswith("pruneops: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["pmod"], ["pyramid", "--layers", "4"], ["pmod", "--layers", "0"], ["pmod", "--layers", "x"]]
)
def test_a_bad_command_line_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["schedule", *arguments])
    assert stop.value.code == BAD_INPUT and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["schedule", "convert"])
def test_help_is_quick_to_reach(command: str) -> None:
    code = (
        f"import sys\nfrom pruneops.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'PIL')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "examples:" in done.stdout
