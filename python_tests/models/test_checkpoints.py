"""Checkpoints as the authors of p-MoD publish them: loaded, converted to Hugging Face's layout, and back."""

from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path
from typing import Any

import original_layout as original
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor

import pruneops
from pruneops import models
from pruneops.cli import BAD_INPUT, OK, main
from pruneops.commands.convert import LAYOUTS
from pruneops.methods import PMoD, PyramidDrop
from pruneops.models import checkpoints
from pruneops.models.checkpoints.tensors import StoredTensor, read_tensors, write_safetensors

IMAGE_TOKEN_ID = original.VOCAB
PADDED_ROWS = 320
KINDS = ["safetensors", "sharded-safetensors", "bin", "sharded-bin"]
CLASSES = {False: models.LlavaForConditionalGeneration, True: models.LlavaNextForConditionalGeneration}
SHAPES = pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava_next"])


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def inputs_for(model: Any) -> dict[str, Tensor]:
    """Two rows of different length, one of them with an image."""
    generator = torch.Generator().manual_seed(1)
    pixels: dict[str, Tensor] = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    if "Next" in type(model).__name__:
        pixels = {
            "pixel_values": torch.randn(1, 4, 3, 16, 16, generator=generator),
            "image_sizes": torch.tensor([[20, 60]]),
        }
    with torch.no_grad():
        count = len(model.model.get_image_features(**pixels).pooler_output[0])
    rows = [[1, 9, 8, *[model.config.image_token_id] * count, 30, 31, 32], [1, 40, 41, 42]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **pixels}


def assert_same_model(model: Any, reference: Any) -> None:
    batch = inputs_for(reference)
    with torch.no_grad():
        ours, theirs = model(**batch).logits, reference(**batch).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[valid][:, : original.VOCAB], theirs[valid][:, : original.VOCAB])
    lengths = model.pruning_run.layer_lengths
    assert lengths[original.MOD_LAYERS[-1]][0] < lengths[0][0] and lengths[-1][1] == lengths[0][1]


# -- original to Hugging Face -----------------------------------------------------------------------------------------


@SHAPES
def test_a_converted_checkpoint_is_the_model_built_by_hand(anyres: bool, tmp_path: Path) -> None:
    tensors = original.write_original(tmp_path / "in", anyres)
    assert checkpoints.convert(tmp_path / "in", tmp_path / "out") == []
    model, info = CLASSES[anyres].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.pruning_run.method == PMoD(parity=True)
    assert_same_model(model, original.by_hand(tensors, anyres))


@SHAPES
def test_the_original_layout_is_loaded_directly(anyres: bool, tmp_path: Path) -> None:
    tensors = original.write_original(tmp_path, anyres, "sharded-safetensors")
    model, info = CLASSES[anyres].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.generation_config.max_length == 4096
    assert_same_model(model, original.by_hand(tensors, anyres))


def test_loading_takes_the_same_arguments_as_for_any_checkpoint(tmp_path: Path) -> None:
    original.write_original(tmp_path)
    method = PMoD(weight_norm="sigmoid_0.5_1", parity=True)
    model = CLASSES[False].from_pretrained(tmp_path, pruning=method, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.pruning_run.method == method


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_hold_the_same_model(kind: str, tmp_path: Path) -> None:
    original.write_original(tmp_path / "one", True)
    original.write_original(tmp_path / "other", True, kind)
    for name in ("one", "other"):
        checkpoints.convert(tmp_path / name, tmp_path / f"{name}-out")
    assert_same_bytes(stored(tmp_path / "other-out"), stored(tmp_path / "one-out"))


def test_a_bin_file_in_the_format_before_zip_archives_is_read(tmp_path: Path) -> None:
    tensors = original.write_original(tmp_path, kind="bin")
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    read = {name: tensor.read() for name, tensor in read_tensors(tmp_path).items()}
    assert_same_bytes(read, tensors)


def test_the_config_is_hugging_faces_with_the_method_in_it(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", True)
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config) is transformers.LlavaNextConfig
    assert config.pruning == PMoD(parity=True).to_dict()
    assert config.image_grid_pinpoints == [[32, 16], [16, 32], [32, 32], [16, 48], [48, 16]]  # (height, width)
    text = config.text_config
    assert (text.rms_norm_eps, text.num_key_value_heads, text.max_position_embeddings) == (1e-5, 2, 4096)
    assert text.rope_parameters["rope_theta"] == 10000.0
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    vision = config.vision_config
    assert (vision.hidden_size, vision.image_size, vision.patch_size) == (64, 16, 4)
    assert (vision.num_hidden_layers, vision.intermediate_size, vision.num_attention_heads) == (2, 48, 1)


def test_the_embedding_gets_rows_for_the_image_token_which_never_win(tmp_path: Path) -> None:
    tensors = original.write_original(tmp_path / "in")
    tensors["lm_head.weight"].abs_().neg_()  # every logit of a positive hidden state is negative
    original.save(tmp_path / "in", tensors, "safetensors")
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    out = stored(tmp_path / "out")
    for name in ("embed_tokens", "lm_head"):
        full = next(tensor for key, tensor in out.items() if key.endswith(f"{name}.weight"))
        assert full.shape == (PADDED_ROWS, original.HIDDEN) and PADDED_ROWS % 64 == 0
        torch.testing.assert_close(full[original.VOCAB :], full[: original.VOCAB].mean(0).expand(61, -1))
    hidden = torch.rand(100, original.HIDDEN)
    assert bool(((hidden @ full.T).argmax(-1) < original.VOCAB).all())


@SHAPES
def test_the_processor_of_a_converted_checkpoint_counts_tokens_as_the_model_does(anyres: bool, tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", anyres)
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = CLASSES[anyres].from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == IMAGE_TOKEN_ID
    assert len(processor.tokenizer.tokenize("a<image>b")) == 3
    assert processor.image_processor.do_pad is True
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    assert prompt.startswith("A chat between") and prompt.endswith("USER: <image>\nWhat? ASSISTANT:")
    image = Image.effect_mandelbrot((60, 20), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None, max_length=None)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_square_aspect_ratio_gets_clips_own_preprocessing(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", image_aspect_ratio="square")
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert "CLIP" in type(AutoProcessor.from_pretrained(tmp_path / "out").image_processor).__name__


def test_without_a_tokenizer_the_user_is_told_what_to_add(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", with_tokenizer=False)
    (note,) = checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert "<image>" in note and f"the id {IMAGE_TOKEN_ID}" in note
    assert (
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").config.image_token_id == IMAGE_TOKEN_ID
    )
    with pytest.warns(UserWarning, match="no tokenizer was converted"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in")


def test_a_tokenizer_that_cannot_be_loaded_here_is_copied_as_it_is(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", with_tokenizer=False)
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    notes = checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert len(notes) == 2 and "cannot load" in notes[0] and "<image>" in notes[1]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"not a sentencepiece model"


# -- vision tower -----------------------------------------------------------------------------------------------------


def test_a_vision_tower_outside_the_checkpoint_is_taken_from_its_own(tmp_path: Path) -> None:
    tensors = original.write_original(tmp_path / "in", tower=False)
    tower = original.write_tower(tmp_path / "clip")
    tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    checkpoints.convert(tmp_path / "in", tmp_path / "out", vision_tower=str(tmp_path / "clip"))
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same_model(model, original.by_hand(tensors, False))
    direct = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in", vision_tower=tmp_path / "clip")
    assert_same_model(direct, original.by_hand(tensors, False))


def test_a_vision_tower_that_the_config_names_by_folder_is_found(tmp_path: Path) -> None:
    original.write_tower(tmp_path / "clip")
    original.write_original(tmp_path / "in", tower=False, mm_vision_tower=str(tmp_path / "clip"))
    checkpoints.convert(tmp_path / "in", tmp_path / "out")


# -- and back ---------------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_gives_the_same_bytes_and_the_same_config(
    anyres: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = original.write_original(tmp_path / "in", anyres, dtype=dtype)
    checkpoints.convert(tmp_path / "in", tmp_path / "hf", max_shard_bytes=30_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="pmod")
    assert_same_bytes(stored(tmp_path / "back"), tensors)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "back"))
    assert after == before


@SHAPES
def test_back_and_there_gives_the_same_bytes_of_a_trained_model(anyres: bool, tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", anyres)
    model = CLASSES[anyres].from_pretrained(tmp_path / "in")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.01)
    model.save_pretrained(tmp_path / "hf")
    checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="pmod")
    checkpoints.convert(tmp_path / "back", tmp_path / "again")
    again = CLASSES[anyres].from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in model.state_dict().items():
        rows = original.VOCAB if name.endswith(("embed_tokens.weight", "lm_head.weight")) else None
        assert torch.equal(again[name][:rows], tensor[:rows]), name


def test_a_model_that_never_was_original_gets_a_config_that_describes_it(tmp_path: Path) -> None:
    tensors = original.write_original(tmp_path / "in")
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in")
    del model.config.source_config
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="vision_tower: got none"):
        checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="pmod")
    checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="pmod", vision_tower="some/clip")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    same = (
        *("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "mm_hidden_size"),
        *("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "model_type", "architectures"),
        *original.METHOD,
    )
    expected = original.original_config(False)
    assert {key: config[key] for key in same} == {key: expected[key] for key in same}
    assert config["mm_vision_tower"] == "some/clip" and config["vocab_size"] == PADDED_ROWS
    assert stored(tmp_path / "back").keys() == tensors.keys()
    with pytest.warns(UserWarning, match=f"the id {PADDED_ROWS}"):  # the rows that were added belong to it now
        again = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert_same_model(again, original.by_hand(tensors, False, image_token_id=PADDED_ROWS))


def test_a_model_whose_ratios_the_official_code_would_change_is_not_converted(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in")
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in")
    pruneops.detach(model)
    run = pruneops.attach(model, PMoD())
    assert run.method.keep_ratios(original.LAYERS) != PMoD(parity=True).keep_ratios(original.LAYERS)
    model.config.pruning = PMoD().to_dict()
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="takes 31 for the depth"):
        checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="pmod")


def test_a_model_of_another_method_is_not_converted(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in")
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in", pruning=PyramidDrop())
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="'method': 'pyramiddrop'.*expected one of the method 'pmod'"):
        checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="pmod")


# -- what cannot be right ---------------------------------------------------------------------------------------------


def change(folder: Path, **changes: Tensor | None) -> None:
    """Rewrite tensors of ``model.safetensors``, by names with ``__`` for points; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


BROKEN_TENSORS = [
    ({"model__layers__8__router__router__weight": None}, r"1 of 8 tensors of routers are missing: model\.layers\.8"),
    ({"model__layers__9__router__router__bias": None}, r"missing: model\.layers\.9\.router\.router\.bias"),
    ({"model__layers__8__router__router__weight": torch.full((1, 32), torch.nan)}, "holds NaN or infinity"),
    ({"model__layers__8__router__router__bias": torch.tensor([torch.inf])}, "holds NaN or infinity"),
    ({"model__layers__8__router__router__weight": torch.zeros(2, 32)}, r"has shape \(2, 32\), expected \(1, 32\)"),
    ({"model__layers__3__router__router__weight": torch.zeros(1, 32)}, "routers where config.json has none"),
    ({"model__layers__3__mlp__up_proj__weight": None}, r"1 tensors are missing: .*layers\.3\.mlp\.up_proj"),
    ({"model__norm__weight": torch.zeros(31)}, r"norm\.weight from model\.safetensors has shape \(31,\)"),
    ({"model__embed_tokens__weight": torch.zeros(258, 32)}, r"embed_tokens\.weight .* has shape \(258, 32\)"),
    ({"model__mm_projector__4__weight": torch.zeros(2)}, r"1 tensors that the model does not have: .*mm_projector\.4"),
    ({"model__image_newline": torch.zeros(32)}, "does not have: image_newline"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_TENSORS, ids=[message for _, message in BROKEN_TENSORS])
def test_tensors_that_cannot_be_right_are_refused_before_anything_is_written(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    original.write_original(tmp_path / "in")
    change(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=message):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in")


def test_a_next_checkpoint_without_its_newline_is_refused(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", True)
    change(tmp_path / "in", model__image_newline=None)
    with pytest.raises(ValueError, match="1 tensors are missing: image_newline"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")


BROKEN_CONFIGS = [
    (
        {"model_type": "llava_llama"},
        "model_type 'llava_llama', expected one of llava, llava_next, llava_llama or dynamic_llava_llama with "
        "sparse_config, pmod_llava_llama",
    ),
    ({"mod_target_layers": None}, "got no mod_target_layers"),
    ({"mod_target_layers": "shiftedcos_decay_85_15"}, "layers: got 'shiftedcos_decay_85_15'"),
    ({"mod_router_factor": 1.5}, "router_factor: got 1.5"),
    ({"mod_weight_norm": "relu_1_1"}, "weight_norm: got 'relu_1_1'"),
    ({"mod_target_layer_indices": [7, 8, 9, 10, 11]}, "mod_target_layer_indices is"),
    ({"mod_bias_enabled": False}, "routers where config.json has none"),
    ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
    ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None"),
    ({"mm_hidden_size": 32}, "its hidden_size is 64, expected mm_hidden_size=32"),
    ({"hidden_size": None}, "hidden_size is None, expected a whole number"),
    ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type is 'flat'"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_CONFIGS, ids=[message for _, message in BROKEN_CONFIGS])
def test_a_config_that_cannot_be_right_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=message):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", kind="sharded-safetensors")
    (tmp_path / "in" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 3 shards are missing .*: model-00002-of-00003.safetensors"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")


def test_a_shard_that_lacks_what_the_index_promises_is_refused(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", kind="sharded-bin")
    file = tmp_path / "in" / "pytorch_model-00003-of-00003.bin"
    values = torch.load(file)
    values.pop(name := next(iter(values)))
    torch.save(values, file)
    with pytest.raises(ValueError, match=f"shards do not hold: {name}"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_that_was_cut_off_is_refused(kind: str, tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", kind=kind)
    (file,) = (tmp_path / "in").glob(f"*model.{kind}")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"cannot read .*{file.name}"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    original.write_original(tmp_path / "in", kind="bin")
    torch.save({"a": Evil()}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        checkpoints.convert(tmp_path, tmp_path / "out")
    original.write_original(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights, expected one of"):
        checkpoints.convert(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no such folder"):
        checkpoints.convert(tmp_path / "missing", tmp_path / "out")


def test_a_tower_is_asked_for_where_its_weights_are_missing(tmp_path: Path) -> None:
    original.write_original(tmp_path, tower=False)
    with pytest.raises(ValueError, match="mm_vision_tower='openai/clip-vit-large-patch14-336', to be given as"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_class_is_refused_with_the_name_of_its_own(tmp_path: Path) -> None:
    original.write_original(tmp_path, True)
    with pytest.raises(ValueError, match="is of the class LlavaNextForConditionalGeneration"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_tower_for_a_checkpoint_that_has_its_own_is_refused(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="vision_tower: got 'clip', expected None"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", vision_tower="clip")


# -- command line -----------------------------------------------------------------------------------------------------


def test_the_command_converts_shows_progress_and_refuses_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original.write_original(tmp_path / "in", kind="sharded-bin")
    command = ["convert", "--from", "pmod", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*command, "--max-shard-size", "50KB"]) == OK
    printed = capsys.readouterr()
    assert printed.err.startswith("reading ") and "writing: 100 %" in printed.err
    sharded = {file.name for file in (tmp_path / "out").glob("model*")}
    assert len(sharded) > 3

    assert main(command) == BAD_INPUT
    assert "is there already, expected a new or empty folder, or force (--force)" in capsys.readouterr().err
    assert main([*command, "--force", "--quiet"]) == OK
    assert capsys.readouterr().err == ""
    assert {file.name for file in (tmp_path / "out").glob("model*")} == {"model.safetensors"}
    back = ["convert", "--to", "pmod", str(tmp_path / "out"), str(tmp_path / "back"), "--quiet"]
    assert main(back) == OK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "hf"], "its layout is pmod, expected hf as asked for"),
        (["--to", "pmod"], "its layout is pmod, expected one to convert to pmod"),
        (["--vision-tower", "./nowhere"], "vision tower: no such folder: ./nowhere"),
    ],
)
def test_the_layout_is_read_off_the_config_and_what_is_asked_for_has_to_fit_it(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original.write_original(tmp_path / "llava-pmod-hf")
    assert main(["convert", str(tmp_path / "llava-pmod-hf"), str(tmp_path / "out"), "--quiet", *arguments]) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_the_checkpoint_itself_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = original.write_original(tmp_path)
    assert main(["convert", str(tmp_path), str(tmp_path / "." / ""), "--force"]) == BAD_INPUT
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert_same_bytes(stored(tmp_path), tensors)


def test_the_command_knows_every_layout() -> None:
    assert sorted(LAYOUTS) == sorted(["hf", *checkpoints.layout_names()])


def test_an_interrupted_conversion_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.convert(tmp_path / "in", tmp_path / "out", progress=stop)
    assert list((tmp_path / "out").iterdir()) == []
    checkpoints.convert(tmp_path / "in", tmp_path / "out")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read() -> Tensor:
        nonlocal most
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    tensors = {f"t{i}": StoredTensor((1000,), torch.float32, tmp_path, read) for i in range(20)}
    write_safetensors(tmp_path, tensors, 10**9, lambda name, nbytes: None)
    assert len(alive) == 20 and most == 1


def test_load_state_dict_takes_the_names_that_save_pretrained_writes(tmp_path: Path) -> None:
    """The Trainer resumes by it, and would go on with the weights of the beginning."""
    original.write_original(tmp_path / "in", True)
    model = models.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "in")
    saved = {name: weight + 1 for name, weight in model.state_dict().items()}
    other = models.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "in")
    other.load_state_dict(saved)
    other.save_pretrained(tmp_path / "saved")
    written = stored(tmp_path / "saved")
    assert written.keys() != saved.keys()
    wrapped = torch.nn.ModuleDict({"module": model})
    for target, prefix in ((model, ""), (wrapped, "module.")):
        for weight in model.parameters():
            torch.nn.init.zeros_(weight)
        target.load_state_dict({prefix + name: weight for name, weight in written.items()})
        assert_same_bytes(dict(model.state_dict()), saved)


def test_written_files_are_safetensors_with_aligned_tensors(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", dtype=torch.bfloat16)
    checkpoints.convert(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % 2 == 0 for entry in header.values())
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == header.keys()
    assert not list((tmp_path / "out").glob("*.part"))
