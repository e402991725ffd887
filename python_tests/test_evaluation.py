"""`pruneops eval`: right answers are counted right, budgets are met, and an interrupted run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import pruneops.evaluation.run as module
from pruneops.cli import BAD_INPUT, OK, main
from pruneops.data import Samples, scene_llava_config, scene_processor
from pruneops.evaluation import WAYS, Exam, Plan, accuracy, evaluate, load_candidate, wilson_interval
from pruneops.evaluation.tally import difference
from pruneops.evaluation.ways import cells_of
from pruneops.methods import AveragePool, DynamicLlava, PMoD, PyramidDrop, RandomDrop
from pruneops.models import LlavaForConditionalGeneration

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vision_hidden_size": 32,
    "vision_layers": 2,
}
TRAINED = {
    "dense": None,
    "pyramid": PyramidDrop(keep_ratios=(0.4, 0.2, 0.1)),
    "pmod": PMoD(),
    "dynamic": DynamicLlava(sparse_layer=1, d_model=32, nhead=2, dim_feedforward=32),
}
FEW = {"questions": 3, "time_batches": (1,), "rounds": 1}


@torch.no_grad()
def save(folder: Path, trained_with: object) -> Path:
    """A model that answers every question with "red", pruned or not: it only looks at the newest token."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(scene_llava_config(**TINY), pruning=trained_with)
    processor = scene_processor()
    for name, weight in model.model.language_model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
    colon = processor.tokenizer("ASSISTANT:").input_ids[-1]
    (red,) = processor.tokenizer(" red", add_special_tokens=False).input_ids
    words = model.get_input_embeddings().weight
    words.zero_()
    words[colon, 0], words[red, 0], words[red, 1] = 1, 2, 1
    # The head has the same weights: "red" is the best match of ":", the end the best of "red".
    words[processor.tokenizer.eos_token_id, :2] = torch.tensor([-5.0, 100.0])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name, method) for name, method in TRAINED.items()}


def reds(exam: Exam) -> str:
    return "".join("01"[question.answer == "red"] for question in exam.questions)


@pytest.fixture(scope="module")
def exam() -> Exam:
    """Few questions, one of whose answers is red."""
    first = next(n for n, sample in enumerate(Samples("test", 500, turns=1)) if sample.turns[0].answer == "red")
    return Exam(size=first + 1)


@pytest.mark.parametrize("name", TRAINED)
def test_accuracy_is_that_of_a_model_whose_answers_are_known(name: str, folders: dict[str, Path], exam: Exam) -> None:
    tally = accuracy(load_candidate(folders[name]), exam=exam, batch_size=16)
    assert tally.right == reds(exam) and tally.score >= 1
    assert (tally.flop_ratio < 1) == (name != "dense")


@pytest.mark.parametrize("method", [AveragePool(), RandomDrop((0,), (0.5,)), PyramidDrop()], ids=str)
def test_methods_that_need_no_training_run_on_any_model(method: object, folders: dict[str, Path]) -> None:
    exam = Exam(size=3)
    for name in ("dense", "pmod"):
        tally = accuracy(load_candidate(folders[name]), method, exam=exam)
        assert tally.right == reds(exam) and tally.kv_ratio < 1


def test_a_blank_picture_leaves_the_question_and_nothing_else(folders: dict[str, Path]) -> None:
    processor = load_candidate(folders["dense"]).processor
    shown, blank = (Exam(size=2).batch(processor, (0, 1), blank) for blank in (False, True))
    assert torch.equal(shown["input_ids"], blank["input_ids"])
    assert torch.equal(blank["pixel_values"][0], blank["pixel_values"][1])
    assert not torch.equal(shown["pixel_values"][0], shown["pixel_values"][1])


def test_the_constant_score_is_that_of_the_most_frequent_answers() -> None:
    exam = Exam(size=60)
    answers: dict[str, list[str]] = {}
    for sample in Samples("test", 60, turns=1):
        answers.setdefault(sample.turns[0].template, []).append(sample.turns[0].answer)
    assert exam.constant_score == sum(Counter(found).most_common(1)[0][1] for found in answers.values())


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_intervals() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert difference("1100", "1010") == pytest.approx((0.0, 1.96 * (0.5 / 4) ** 0.5), abs=1e-3)
    assert difference("1111", "0000") == (1.0, 0.0)


@pytest.mark.parametrize("name", TRAINED)
def test_every_cell_spends_its_budget(name: str, folders: dict[str, Path]) -> None:
    candidate = load_candidate(folders[name])
    cells, notes = cells_of(candidate, tuple(WAYS), (0.6, 0.1))
    budgeted = [cell for cell in cells if cell.keep is not None]
    assert budgeted and {cell.way for cell in cells} <= set(WAYS)
    # A tenth is less than the first quarter of the layers alone.
    assert len(notes) == sum(cell.keep == 0.6 for cell in cells)
    text = None
    for cell in budgeted:
        tally = accuracy(candidate, cell.method, exam=Exam(size=1))
        text = tally.dense_tokens - 576
        assert (tally.mean_tokens - text) / 576 == pytest.approx(cell.keep, abs=0.01), cell
    assert text and text > 0


# -- the whole evaluation ----------------------------------------------------------------------------------------------


def test_an_evaluation_writes_numbers_tables_and_a_chart(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = Plan(keep=(), **FEW)
    results = evaluate(list(folders.values()), tmp_path, plan, command="as asked", say=lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", "eval.md", "eval.svg"}
    document = json.loads((tmp_path / "eval.json").read_text())
    assert document["settings"]["questions"] == 3 and document["about"]["command"] == "as asked"
    by_model = {name: {entry.way for entry in results.entries if entry.model == name} for name in folders}
    assert by_model["dense"] == {"stock", *WAYS} - {"own"}
    assert by_model["pyramid"] == by_model["dynamic"] == {"stock", "dense", "blank", "own"}
    assert by_model["pmod"] == {"stock", "own"}
    right = reds(Exam(size=3))
    for entry in results.entries:
        assert entry.tally.right == ("" if entry.way == "stock" else right)
        assert set(entry.times) == (set() if entry.way == "blank" else {1})
    tables = (tmp_path / "eval.md").read_text()
    for word in ("as asked", "`dense` dense", "own, dynamic_llava", "published", "trained", "## Time", "random-input"):
        assert word in tables
    drawn = ElementTree.parse(tmp_path / "eval.svg").getroot()
    assert len([tag for tag in drawn.iter() if tag.tag.endswith("circle")]) > len(results.entries)


def test_an_interrupted_evaluation_goes_on(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(methods=("dense", "random"), keep=(), batch_size=1, **FEW)
    asked: list[tuple[str, int]] = []
    examine = module.examine

    def interrupted(candidate, method, exam, numbers, inputs):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((method.name, numbers[0]))
        return examine(candidate, method, exam, numbers, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "examine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate([folders["dense"]], tmp_path, plan, say=lambda line: None)
    # The second question was not answered in every way, so it is asked again; the first is not.
    asked.clear()

    def counted(candidate, method, exam, numbers, inputs):
        asked.append((method.name, numbers[0]))
        return examine(candidate, method, exam, numbers, inputs)

    monkeypatch.setattr(module, "examine", counted)
    whole = evaluate([folders["dense"]], tmp_path, plan, say=lambda line: None)
    assert sorted(asked) == sorted((way, number) for way in ("pyramiddrop", "random") for number in (1, 2))
    assert {entry.tally.questions for entry in whole.entries} == {0, 3}  # 0: stock
    asked.clear()
    evaluate([folders["dense"]], tmp_path, plan, say=lambda line: None)
    assert not asked
    # Another method is added to what is there; another number of questions cannot be.
    evaluate([folders["dense"]], tmp_path, Plan(methods=("pool",), keep=(), batch_size=1, **FEW), say=lambda line: None)
    assert {name for name, _ in asked} == {"average_pool"}
    with pytest.raises(ValueError, match="out: .* with questions 3, expected questions 2 or another folder"):
        evaluate([folders["dense"]], tmp_path, Plan(batch_size=1, **{**FEW, "questions": 2}))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_says_how_far_it_is(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--model", str(folders["dense"]), "--out", str(tmp_path), "--methods", "dense,pool"]
    assert main([*arguments, "--questions", "2", "--batch", "1", "--rounds", "1"]) == OK
    printed = capsys.readouterr()
    assert "| dense | pool | 0.25 |" in printed.out and "eval.svg" in printed.out
    assert "2 of 2 questions" in printed.err and "left" in printed.err
    assert "--batch 1" in (tmp_path / "eval.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing"], "model: got missing, expected a folder"),
        (["--methods", "dense,magic"], "methods: got magic, expected some of dense"),
        (["--methods", "own"], "methods: got own, expected some that suit dense"),
        (["--keep", "0.5,1.5"], "keep: got 1.5, expected shares in (0, 1]"),
        (["--split", "holiday"], "split must be one of train"),
        (["--batch", "1,0"], "time_batches: got 0, expected at least 1"),
        (["--device", "nowhere"], "device: got 'nowhere'"),
        (["--out", __file__], "out: got the file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folders: dict[str, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--model" in arguments else ["--model", str(folders["dense"])]
    assert main(["eval", *given, *arguments]) == BAD_INPUT
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_models_of_other_pictures_words_or_kinds_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def changed(**entries: object) -> Path:
        config = json.loads((folders["dense"] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | entries))
        return tmp_path

    with pytest.raises(ValueError, match="has no processor"):
        load_candidate(changed())
    with pytest.raises(ValueError, match="is of the type 'llama', expected a llava"):
        load_candidate(changed(model_type="llama"))
    scene_processor().save_pretrained(tmp_path)
    vision = json.loads((folders["dense"] / "config.json").read_text())["vision_config"]
    with pytest.raises(ValueError, match="sees pictures of 96 pixels in patches of 8, expected 24 patches"):
        load_candidate(changed(vision_config=vision | {"image_size": 96}))


def test_help_is_quick_to_reach_and_names_every_way() -> None:
    code = (
        "import sys\nfrom pruneops.cli import main\n"
        "try: main(['eval', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'PIL')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(way in done.stdout for way in WAYS)
