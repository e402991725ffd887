"""The folder that an export writes, and the command that calls it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pruneops.cli import BAD_INPUT, OK, main
from pruneops.data import KINDS, SampleDataset, Samples, export, scene_processor
from pruneops.data.export import write_atomically
from pruneops.training import LlavaDataset


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_has_pictures_conversations_and_settings(tmp_path: Path) -> None:
    samples = Samples("train", 3, kinds=("questions", "description", "clip"), turns=3)
    path = export(samples, tmp_path)
    records = json.loads(path.read_text())
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == records
    assert [record["kind"] for record in records] == ["questions", "description", "clip"]
    assert [len(record["templates"]) for record in records] == [3, 1, 3]
    assert records[0]["conversations"][0]["value"].startswith("<image>\n")
    assert records[2]["conversations"][0]["value"].count("<image>") == len(records[2]["image"]) == 8
    with Image.open(tmp_path / records[0]["image"]) as picture:
        assert (np.asarray(picture) == samples[0].pictures[0]).all()
    assert not [name for name in files(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_train_as_the_samples_do(tmp_path: Path, kind: str) -> None:
    """What `train_sft.py` reads of the folder is what `SampleDataset` makes without one."""
    samples = Samples("train", 2, kinds=[kind])
    processor = scene_processor(grid=samples[0].grid)
    read, made = LlavaDataset(export(samples, tmp_path), processor), SampleDataset(samples, processor)
    assert len(read) == len(made) == 2
    for one, other in zip(read, made, strict=False):
        assert all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()
    frames, tokens = len(samples[0].pictures), samples[0].grid ** 2
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((made[0]["input_ids"] == image).sum()) == frames * tokens
    assert made[0]["pixel_values"].shape[0] == frames
    told = processor.tokenizer.decode(made[0]["labels"][made[0]["labels"] >= 0])
    assert told == "".join(f" {turn.answer}</s>" for turn in samples[0].turns)


def test_an_interrupted_export_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    samples = Samples("train", 4, kinds=("questions", "clip"))

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(samples, tmp_path / "a", stop)
    assert not (tmp_path / "a" / "train.json").exists()
    kept = sorted((tmp_path / "a").rglob("*.png"))
    times = [path.stat().st_mtime_ns for path in kept]
    seen: list[tuple[int, int]] = []
    export(samples, tmp_path / "a", lambda done, total: seen.append((done, total)))
    export(samples, tmp_path / "b")
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_file_that_could_not_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.png", b"")
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_more_samples_and_splits_but_no_other_settings(tmp_path: Path) -> None:
    export(Samples("train", 1), tmp_path)
    assert len(json.loads(export(Samples("train", 3), tmp_path).read_text())) == 3
    export(Samples("test", 1, turns=1), tmp_path)
    with pytest.raises(ValueError, match="holds train with patch_size 8, expected patch_size 14"):
        export(Samples("train", 3, patch_size=14), tmp_path)
    (tmp_path / "test.settings.json").write_text("[]")
    with pytest.raises(ValueError, match="is not what an export wrote, expected another folder"):
        export(Samples("test", 1, turns=1), tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a folder, got the file"):
        export(Samples("train", 1), tmp_path / "file")


def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "write", str(tmp_path), "--size", "2", "--split", "validation", "--kinds", "questions, clip"]
    assert main([*arguments, "--quiet"]) == OK
    assert capsys.readouterr() == (f"{tmp_path / 'validation.json'}: 2 samples\n", "")
    assert len(list(tmp_path.rglob("*.png"))) == 9


def test_the_command_shows_pictures_with_questions_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert main(["data", "show", "--seed", "3", "--count", "2", "--out", str(out)]) == OK
    printed = capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.width > 1000
    sample = Samples("test", 2, seed=3, turns=6)[1]
    assert all(f"  {turn.text}  {turn.answer}\n" in printed for turn in sample.turns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--out", "sheet.gif"], "--out must be a file ending in .png, got sheet.gif"),
        (["show", "--kinds", "film"], "kinds must be a sequence of some of questions, description, references, clip"),
        (["show", "--patch-size", "4"], "patch_size must be from 8 to 32 pixels, got 4"),
        (["write", "OUT", "--size", "1", "--split", "dev"], "split must be one of train, validation, test, got 'dev'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *arguments]) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_names_the_kinds_and_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (("write", "SPLIT.jsonl"), ("show", "contact sheet")):
        with pytest.raises(SystemExit, match="0"):
            main(["data", command, "--help"])
        printed = capsys.readouterr().out
        assert words in printed and "questions, description, references (" in " ".join(printed.split())
