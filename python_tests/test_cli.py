"""The command line: what it prints and writes, and that errors are one clear line and an exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_small_model import TINY

import pruneops
from pruneops import models, runner
from pruneops.cli import BAD_INPUT, FAILED, INTERRUPTED, OK, main
from pruneops.data import Samples
from pruneops.methods import DynamicLlava, PMoD, PruningMethod
from pruneops.models import scene
from pruneops.models.small import build_small_llava, small_tokenizer
from pruneops.runner import ASSET


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small only waits for other threads, for long where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_llava(tmp_path_factory.mktemp("small"), num_visual_tokens=144, **TINY)


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A LLaVA-NeXT of the small model's parts."""
    from transformers import (
        AutoConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    small = AutoConfig.from_pretrained(checkpoint)
    tile, pinpoints = small.vision_config.image_size, [[168, 336], [336, 168], [336, 336]]
    config = LlavaNextConfig(
        vision_config=small.vision_config,
        text_config=small.text_config,
        image_token_id=small.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(images, small_tokenizer(), patch_size=14, vision_feature_select_strategy="default")
    processor.num_additional_image_tokens = 1
    folder = tmp_path_factory.mktemp("next")
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(checkpoint: Path, *arguments: object) -> int:
    base = ["run", "--model", checkpoint, "--max-new-tokens", 4, "--repeat", 1, "--quiet"]
    return main([str(argument) for argument in (*base, *arguments)])


def test_a_batch_is_answered_three_ways_with_table_picture_and_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.png"
    Image.effect_mandelbrot((80, 60), (-2, -1.5, 1, 1.5), 20).save(other)
    code = run(
        checkpoint,
        *("--image", ASSET, "--image", other, "--prompt", "What is it?", "--batch", 3),
        *("--layers", "1,3", "--keep", "0.5,0.1", "--out", tmp_path / "out", "--json", tmp_path / "run.json"),
    )
    printed = capsys.readouterr()
    assert code == OK and printed.err == ""
    for word in ("untrained", "stock", "dense", "pruned", "GFLOP", "KV", "of dense", "kept.png"):
        assert word in printed.out or word == "GFLOP" and "FLOP" in printed.out
    assert "[1] other.png" in printed.out and "[2]" not in printed.out

    document = json.loads((tmp_path / "run.json").read_text())
    assert document["untrained"] and document["method"]["layers"] == [1, 3] and len(document["rows"]) == 3
    first, second, repeated = document["rows"]
    assert [len(stage) for stage in first["kept"]] == [72, 14]
    assert set(first["kept"][1]) < set(first["kept"][0]) and first["kept"][0] == sorted(first["kept"][0])
    assert first["kept"] == repeated["kept"] != second["kept"]
    assert first["answers"]["dense"] == first["answers"]["stock"]
    dense, pruned = document["reports"]["dense"], document["reports"]["pruned"]
    assert dense["layer_lengths"][0] == pruned["layer_lengths"][0]
    assert dense["layer_lengths"][0][0] - pruned["layer_lengths"][-1][0] == 144 - 14
    assert pruned["flops"] < dense["flops"] == pruned["dense_flops"]

    with Image.open(tmp_path / "out" / "kept.png") as picture:
        # Two questions below each other, three panels side by side.
        assert picture.width > 3 * 300 and picture.height > 2 * 300


def test_default_layers_are_the_quarter_points(checkpoint: Path, tmp_path: Path) -> None:
    assert run(checkpoint, "--json", tmp_path / "run.json", "--out", tmp_path / "picture.png") == OK
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["method"]["layers"] == [1, 2, 3]
    assert document["picture"] == str(tmp_path / "picture.png") and (tmp_path / "picture.png").is_file()


def test_a_llava_next_checkpoint_is_drawn_as_overview_and_detail(
    next_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--image", ASSET, "--out", tmp_path / "next.png", "--json", tmp_path / "run.json")
    assert run(next_checkpoint, *arguments) == OK
    assert "as stock" in capsys.readouterr().out
    row = json.loads((tmp_path / "run.json").read_text())["rows"][0]
    count = row["visual_tokens"]
    assert count > 144
    assert [len(stage) for stage in row["kept"]] == [int(count * r) for r in (0.5, 0.25, 0.125)]
    with Image.open(tmp_path / "next.png") as picture:
        assert picture.height > 2 * 200


def test_without_an_image_a_picture_is_rendered_from_the_seed_and_asked_its_own_questions(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, "--seed", 7, "--json", tmp_path / "run.json") == OK
    (sample,) = Samples("test", 1, seed=7, turns=6)
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [(row["prompt"], row["truth"]) for row in rows] == [(turn.text, turn.answer) for turn in sample.turns]
    assert {row["sample"] for row in rows} == {sample.name}
    printed = capsys.readouterr().out
    assert f"[0] rendered picture {sample.name}: {sample.turns[0].text}\n" in printed
    assert f"    truth   {sample.turns[0].answer}\n" in printed and "(wrong, as stock)" in printed
    assert f"right of {len(rows)}: stock 0, dense 0, pruned 0\n" in printed


def test_any_question_of_a_rendered_picture_is_known_and_no_other(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ("--prompt", "Describe the picture.", "--prompt", "What is in this picture?")
    assert run(checkpoint, *prompts, "--json", tmp_path / "run.json") == OK
    described, unknown = (row["truth"] for row in json.loads((tmp_path / "run.json").read_text())["rows"])
    assert described.startswith("The picture shows ") and unknown is None
    printed = capsys.readouterr().out
    assert printed.count("truth   ") == 1 and "right of 1: " in printed


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [("top left", "top left", True), (" Red.\n", "red", True), ("red ring", "red", False), ("", "0", False)],
)
def test_an_answer_is_right_if_its_words_are_those_of_the_truth(text: str, truth: str, right: bool) -> None:
    assert runner.is_right(text, truth) is right


def test_a_model_that_knows_rendered_pictures_only_says_so_of_others(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "marked")
    config = json.loads((folder / "config.json").read_text())
    del config["pruneops_untrained"]
    config[scene.TRAINING_KEY] = {"note": "knows shapes only"}
    (folder / "config.json").write_text(json.dumps(config))
    for arguments, note in ((("--image", ASSET), "knows shapes only"), (("--prompt", "What is it?"), "")):
        assert run(folder, *arguments, "--json", tmp_path / "run.json") == OK
        assert json.loads((tmp_path / "run.json").read_text())["note"] == note
        assert ("note    knows shapes only\n" in capsys.readouterr().out) is bool(note)


@pytest.mark.parametrize(
    "method",
    [PMoD(layers="interleave"), DynamicLlava(sparse_layer=1, d_model=32, nhead=4, dim_feedforward=32, num_layers=1)],
    ids=lambda method: method.name,
)
def test_a_model_that_was_trained_with_a_method_answers_with_it_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: PruningMethod
) -> None:
    from transformers import AutoProcessor

    folder = shutil.copytree(checkpoint, tmp_path / "trained")
    torch.manual_seed(0)
    model = models.LlavaForConditionalGeneration.from_pretrained(checkpoint, pruning=method)
    model.save_pretrained(folder)
    arguments = ("--image", ASSET, "--prompt", "What?", "--json", tmp_path / "run.json", "--out", tmp_path / "a.png")
    assert run(folder, *arguments) == OK
    printed = capsys.readouterr().out
    assert "stock" not in printed and "of dense" in printed and (tmp_path / "a.png").is_file()
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["method"] == method.to_dict() and list(document["reports"]) == ["pruned"]
    assert document["reports"]["pruned"]["flop_ratio"] < 1

    questions = [runner.Question(ASSET, "What?")]
    loaded = runner.Loaded(model, AutoProcessor.from_pretrained(folder), "", True)
    inputs = runner.prepare(loaded, questions, runner.check_images(questions))
    ids = model.generate(**inputs.features, max_new_tokens=4, do_sample=False)[0, inputs.prompt_length :]
    expected = loaded.processor.decode(ids, skip_special_tokens=True).strip()
    assert document["rows"][0]["answers"] == {"pruned": expected}

    assert run(folder, "--keep", 0.5) == BAD_INPUT
    assert f"was trained with {method.name} and only runs with it" in capsys.readouterr().err


def test_weights_that_do_not_ship_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scene, "_ASSETS", tmp_path)
    assert main(["run", "--quiet"]) == FAILED
    err = capsys.readouterr().err
    assert f"there are none in {tmp_path / 'scene_llava'}" in err and err.count("\n") == 1


def test_progress_is_plain_lines_on_stderr(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--model", checkpoint, "--max-new-tokens", "1", "--out", tmp_path / "a.png"]
    assert main([str(argument) for argument in arguments]) == OK
    err = capsys.readouterr().err
    for step in ("loading the model", "answering, stock", "answering, dense", "answering, pruned"):
        assert f"{step}: " in err


BROKEN = [
    (["--image", "missing.jpg"], "image: no such file: missing.jpg"),
    (["--image", "."], "image: not a file: ."),
    (["--image", __file__], "image: not an image that PIL can read"),
    (["--model", "./missing"], "model: no such folder: ./missing"),
    (["--layers", "1,2", "--keep", "0.5"], "1 ratios for 2 layers"),
    (["--layers", "1,4", "--keep", "0.5,0.25"], "layers: got 4, expected at most 3"),
    (["--layers", "2,1", "--keep", "0.5,0.25"], "layers: got (2, 1)"),
    (["--layers", "1,2", "--keep", "0.25,0.5"], "keep_ratios: got (0.25, 0.5)"),
    (["--keep", "1.5"], "keep_ratios: got 1.5"),
    (["--keep", "0"], "keep_ratios: got 0.0"),
    (["--prompt", "  "], "--prompt must not be empty"),
    (["--image", ASSET, "--image", ASSET, *["--prompt", "a"] * 3], "got 3 prompts for 2 images"),
    (
        ["--image", ASSET, "--image", ASSET, "--batch", "1"],
        "--batch must be at least the number of questions",
    ),
    (["--out", __file__], "--out must be a folder or a file ending in .png"),
    (["--json", "."], "cannot write the file ."),
    (["--video", "clip.mp4", "--image", ASSET], "--video cannot be given together with --image"),
    (["--device", "nowhere"], "device must be a torch device such as cpu or cuda, got 'nowhere'"),
]


@pytest.mark.parametrize(("arguments", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_bad_input_is_one_line_and_exit_code_2(
    checkpoint: Path, arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, *arguments) == BAD_INPUT
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("pruneops: error: ")
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_a_truncated_image_is_bad_input(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(ASSET.read_bytes()[:20000])
    assert run(checkpoint, "--image", broken) == BAD_INPUT
    assert f"image: cannot read {broken}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "llama"}', "is not a LLaVA checkpoint: its model_type is 'llama'"),
        ("{}", "is not a checkpoint that transformers can load"),
    ],
)
def test_another_kind_of_checkpoint_is_bad_input(
    tmp_path: Path, config: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    assert run(tmp_path) == BAD_INPUT
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_llava_without_weights_is_bad_input(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    assert run(tmp_path) == BAD_INPUT
    assert "could not be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--keep", "half"],
        ["run", "--seed", "-1"],
        ["run", "--batch", "0"],
        ["run", "--method", "magic"],
        [],
        ["walk"],
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == BAD_INPUT and err.count("\n") == 1 and "--help" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeError("out\nof memory"), FAILED, "pruneops: error: out of memory\n"),
        (KeyboardInterrupt(), INTERRUPTED, "pruneops: interrupted\n"),
        (ModuleNotFoundError("no", name="transformers"), FAILED, "install pruneops[cli]\n"),
    ],
)
def test_failures_while_running_have_their_own_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pruneops.runner.load", fail)
    assert main(["run", "--quiet"]) == code
    assert capsys.readouterr().err.endswith(line)


def test_info_names_versions_isa_and_the_backend_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    from pruneops import backends

    assert main(["info"]) == OK
    out = capsys.readouterr().out
    for word in ("torch", "transformers", "triton", "active_isa", pruneops.__version__, *backends.OPS):
        assert word in out


def test_help_is_quick_to_reach_and_lists_the_exit_codes() -> None:
    code = (
        "import sys\nfrom pruneops.cli import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'PIL')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "exit codes" in done.stdout


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pruneops", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == f"pruneops {pruneops.__version__}"


def test_the_photograph_ships_with_its_licence() -> None:
    assert ASSET.stat().st_size < 120_000
    licence = (ASSET.parent / "LICENSE-coffee.txt").read_text()
    assert "CC0" in licence and "scikit-image" in licence
