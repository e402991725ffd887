"""PLLaVA: pooled frames, checkpoints under their released names, and LoRA adapters merged while loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pruneops.methods import PyramidDrop
from pruneops.models import PllavaConfig, PllavaForConditionalGeneration
from pruneops.models.pllava import merge_lora

RANK, ALPHA = 4, 14
FAMILY = tiny.VIDEO_FAMILIES["pllava"]
BATCH = FAMILY.batch([[3, "video", 5], [2, "video", 9]], 5)
ADAPTED = ("q_proj", "v_proj")


def released_names(model: nn.Module, peft: str = "") -> dict[str, Tensor]:
    """The model's weights under the names of released checkpoints; `peft`: "new", "old" or "" for no wrapper."""
    state = {"image_newline": torch.zeros(4)}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        name = name.replace("lm_head.", "language_model.lm_head.")
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if peft:
            name = name.replace("language_model.", "language_model.base_model.model.")
            if peft == "new" and any(f".self_attn.{layer}." in name for layer in ADAPTED):
                name = name.replace("_proj.", "_proj.base_layer.")
        state[name] = weight.clone()
    return state


def adapters_for(model: nn.Module, prefix: str = "language_model.base_model.model.", adapter: str = ".default") -> dict:
    generator = torch.Generator().manual_seed(3)
    config = model.config.text_config
    adapters = {}
    for i in range(config.num_hidden_layers):
        for layer in ADAPTED:
            out, into = model.get_parameter(f"model.language_model.layers.{i}.self_attn.{layer}.weight").shape
            name = f"{prefix}model.layers.{i}.self_attn.{layer}."
            adapters[f"{name}lora_A{adapter}.weight"] = 0.3 * torch.randn(RANK, into, generator=generator)
            adapters[f"{name}lora_B{adapter}.weight"] = 0.3 * torch.randn(out, RANK, generator=generator)
    return adapters


def write(folder: Path, model: nn.Module, state: dict[str, Tensor], shards: int = 1, **config: Any) -> Path:
    """A checkpoint folder as released: a config without the adapters' alpha, and safetensors in some shards."""
    folder.mkdir()
    values = {**model.config.to_dict(), **config}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "pad_token_id": tiny.PAD}))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key, at in weight_map.items() if at == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def logits_with_adapters_beside(model: nn.Module, adapters: dict[str, Tensor]) -> Tensor:
    """Logits of the model while adapters run beside the layers, as PEFT runs them."""
    handles = []
    pairs = [name for name in adapters if ".lora_A." in name]
    for name in pairs:
        down, up = adapters[name], adapters[name.replace(".lora_A.", ".lora_B.")]
        path = name.split(".lora_A.")[0].split("model.layers.")[1]
        handles.append(
            model.get_submodule(f"model.language_model.layers.{path}").register_forward_hook(
                lambda _module, inputs, output, down=down, up=up: output + ALPHA / RANK * (inputs[0] @ down.T @ up.T)
            )
        )
    assert len(handles) == 2 * tiny.LAYERS
    try:
        with torch.no_grad():
            return model(**BATCH).logits
    finally:
        for handle in handles:
            handle.remove()


# -- front end ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_frames_are_projected_and_then_pooled_as_the_published_3d_pooling_does() -> None:
    model = tiny.pllava()
    clips = BATCH["pixel_values_videos"]
    of_each = model.get_video_features(clips).pooler_output
    for clip, found in zip(clips, of_each, strict=True):
        patches = model.model.vision_tower(clip, output_hidden_states=True).hidden_states[-1][:, 1:]
        projected = model.model.multi_modal_projector(patches)
        grid = projected.view(5, 8, 8, 32).permute(3, 0, 1, 2)
        pooled = nn.functional.adaptive_avg_pool3d(grid, (5, 4, 4))
        torch.testing.assert_close(found.flatten(0, 1), pooled.permute(1, 2, 3, 0).flatten(0, 2))
    assert model.video_tokens(5) == 80


def test_shapes_of_the_config_are_checked_and_saved(tmp_path: Path) -> None:
    config = PllavaConfig(pooling_shape=(8, 6, 6), frame_shape=(12, 12))
    config.save_pretrained(tmp_path)
    again = PllavaConfig.from_pretrained(tmp_path)
    assert (tuple(again.pooling_shape), tuple(again.frame_shape)) == ((8, 6, 6), (12, 12))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "pllava"
    assert (PllavaConfig().pooling_shape, PllavaConfig().frame_shape) == ((16, 12, 12), (24, 24))
    with pytest.raises(ValueError, match="pooling_shape"):
        PllavaConfig(pooling_shape=(12, 12))
    with pytest.raises(ValueError, match="frame_shape"):
        PllavaConfig(frame_shape=(24, 0))


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_a_checkpoint_under_released_names_loads(shards: int, tmp_path: Path) -> None:
    model = tiny.pllava()
    folder = write(tmp_path / "released", model, released_names(model), shards)
    loaded, info = PllavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)
    assert loaded.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("peft", ["new", "old"])
def test_adapters_in_the_checkpoint_are_merged(peft: str, shards: int, tmp_path: Path) -> None:
    model = tiny.pllava()
    adapters = adapters_for(model)
    folder = write(tmp_path / "released", model, {**released_names(model, peft), **adapters}, shards)
    loaded, info = PllavaForConditionalGeneration.from_pretrained(folder, lora_alpha=ALPHA, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logits = loaded(**BATCH).logits
        plain = model(**BATCH).logits
    torch.testing.assert_close(logits, logits_with_adapters_beside(model, adapters), atol=1e-4, rtol=1e-4)
    assert (logits - plain).abs().max() > 0.1
    assert loaded.generation_config.max_new_tokens == 7


def test_what_training_saved_goes_before_the_base_checkpoint(tmp_path: Path) -> None:
    base, tuned = tiny.pllava(), tiny.pllava()
    with torch.no_grad():
        for parameter in tuned.model.multi_modal_projector.parameters():
            parameter.mul_(1.5)
    adapters = adapters_for(base)
    saved = {k: v for k, v in released_names(tuned).items() if k.startswith("multi_modal_projector.")}
    folder = write(tmp_path / "base", base, released_names(base), 2)
    trained = write(tmp_path / "trained", base, {**saved, **adapters})
    loaded = PllavaForConditionalGeneration.from_pretrained(folder, weight_dir=trained, lora_alpha=ALPHA)
    expected = logits_with_adapters_beside(tuned, adapters)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_merged_model_is_pruned_saved_and_loaded_again(tmp_path: Path) -> None:
    model = tiny.pllava()
    adapters = adapters_for(model)
    folder = write(tmp_path / "released", model, {**released_names(model, "new"), **adapters}, 2)
    method = PyramidDrop(layers=(2, 4), keep_ratios=(0.5, 0.25))
    loaded = PllavaForConditionalGeneration.from_pretrained(
        folder, lora_alpha=ALPHA, pruning=method, dtype=torch.bfloat16, pooling_shape=(8, 2, 2)
    )
    assert loaded.dtype == torch.bfloat16 and loaded.pruning_run.method == method
    assert tuple(loaded.config.pooling_shape) == (8, 2, 2) and loaded.video_tokens(3) == 12
    loaded.save_pretrained(tmp_path / "merged")
    again = PllavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert again.pruning_run.method == method and tuple(again.config.pooling_shape) == (8, 2, 2)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(again.dtype)), name


def test_a_model_loaded_from_released_names_is_saved_and_loaded_again(tmp_path: Path) -> None:
    model = tiny.pllava()
    folder = write(tmp_path / "released", model, released_names(model))
    PllavaForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again, info = PllavaForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_alpha_is_asked_for_where_there_are_adapters_and_only_there(tmp_path: Path) -> None:
    model = tiny.pllava()
    plain = write(tmp_path / "plain", model, released_names(model))
    adapted = write(tmp_path / "adapted", model, {**released_names(model, "new"), **adapters_for(model)})
    with pytest.raises(ValueError, match="lora_alpha: got None, expected the alpha of the LoRA adapters"):
        PllavaForConditionalGeneration.from_pretrained(adapted)
    with pytest.raises(ValueError, match="lora_alpha: got 4, expected None: the checkpoint holds no LoRA adapters"):
        PllavaForConditionalGeneration.from_pretrained(plain, lora_alpha=4)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no model.safetensors.index.json, model.safetensors"):
        PllavaForConditionalGeneration.from_pretrained(tmp_path)


# -- merge_lora --------------------------------------------------------------------------------------------------------


def test_merging_adds_alpha_over_rank_times_b_a_and_leaves_the_rest() -> None:
    state = {"a.q_proj.weight": torch.randn(6, 5), "a.k_proj.weight": torch.randn(6, 5)}
    before = {name: tensor.clone() for name, tensor in state.items()}
    down, up = torch.randn(2, 5), torch.randn(6, 2)
    merged = merge_lora(state, {"a.q_proj.lora_A.weight": down, "a.q_proj.lora_B.weight": up}, 3)
    torch.testing.assert_close(merged["a.q_proj.weight"], state["a.q_proj.weight"] + 1.5 * up @ down)
    assert torch.equal(merged["a.k_proj.weight"], state["a.k_proj.weight"])
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_merging_rounds_once_to_the_dtype_of_the_weight() -> None:
    weight = torch.randn(6, 5).bfloat16()
    down, up = torch.randn(2, 5).bfloat16(), torch.randn(6, 2).bfloat16()
    merged = merge_lora({"a.weight": weight}, {"a.lora_A.default.weight": down, "a.lora_B.default.weight": up}, 1)
    exact = weight.double() + 0.5 * up.double() @ down.double()
    assert torch.equal(merged["a.weight"], exact.float().bfloat16())


def test_a_file_of_adapters_alone_counts_from_the_language_model() -> None:
    model = tiny.pllava()
    alone = adapters_for(model, prefix="base_model.model.", adapter="")
    within = adapters_for(model)
    state = released_names(model)
    first, second = merge_lora(state, alone, ALPHA), merge_lora(state, within, ALPHA)
    assert first.keys() == second.keys() == state.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], state[name])}
    assert changed == {f"language_model.model.layers.{i}.self_attn.{p}.weight" for i in range(6) for p in ADAPTED}


@pytest.mark.parametrize(
    ("adapters", "alpha", "error", "match"),
    [
        ({}, True, TypeError, "lora_alpha: got True, expected a number"),
        ({}, "14", TypeError, "lora_alpha: got '14'"),
        ({}, 0, ValueError, "lora_alpha: got 0, expected a number above 0"),
        ({}, float("nan"), ValueError, "lora_alpha: got nan"),
        ({"a.bias": (2,)}, 4, ValueError, "adapters: got 'a.bias'"),
        ({"a.lora_A.weight": (2, 5)}, 4, ValueError, "adapters: got only lora_A of a, expected lora_A and lora_B"),
        (
            {"b.lora_A.weight": (2, 5), "b.lora_B.weight": (6, 2)},
            4,
            ValueError,
            "adapters: got one of b, expected layers that the checkpoint has",
        ),
        (
            {"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2)},
            4,
            ValueError,
            r"got lora_A \(2, 4\) and lora_B \(6, 2\) of a, expected \(rank, 5\) and \(6, rank\)",
        ),
        ({"a.lora_A.weight": (2, 5), "a.lora_B.weight": (6, 3)}, 4, ValueError, r"got lora_A \(2, 5\)"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    adapters: dict, alpha: object, error: type[Exception], match: str
) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in adapters.items()}
    with pytest.raises(error, match=match):
        merge_lora({"a.weight": torch.zeros(6, 5)}, tensors, alpha)
