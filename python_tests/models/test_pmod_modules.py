"""p-MoD's layers are real modules: attach, detach, copies, checkpoints, hooks."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from pmod_models import KEPT_OF_16, MOD_LAYERS, ROWS, attached, trained
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import pruneops
from pruneops import models
from pruneops.methods import PMoD, PyramidDrop
from pruneops.methods.mod_layer import ModDecoderLayer
from pruneops.pruning import find_text_model


@pytest.mark.parametrize("build", [tiny.llava, tiny.llava_next, tiny.language_model], ids=lambda f: f.__name__)
def test_attach_renames_weights_as_official_and_detach_restores_the_very_same_modules(build) -> None:
    model = build()
    text_model = find_text_model(model)
    modules = dict(model.named_modules())
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    prefix = next(k for k in keys if k.endswith("layers.0.mlp.up_proj.weight")).removesuffix("0.mlp.up_proj.weight")
    run = pruneops.attach(model, PMoD())
    renamed = []
    for key in keys:
        number, _, rest = key.removeprefix(prefix).partition(".")
        inside = key.startswith(prefix) and int(number) in MOD_LAYERS
        renamed.append(f"{prefix}{number}.decoder_layer.{rest}" if inside else key)
    routers = [f"{prefix}{i}.router.router.{name}" for i in MOD_LAYERS for name in ("weight", "bias")]
    assert sorted(model.state_dict()) == sorted(renamed + routers)
    assert text_model.layers[2].router.router.weight.shape == (1, 32) and run.method == PMoD()
    assert pruneops.detach(model) is model
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == keys
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes


def test_a_detached_model_computes_what_it_did() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS, "left")
    with torch.no_grad():
        before = model(**batch).logits
        attached(model)
        assert not torch.allclose(model(**batch).logits, before)
        pruneops.detach(model)
        assert torch.equal(model(**batch).logits, before)


def test_routers_start_as_asked() -> None:
    for zero_init, bias in ((True, True), (False, True), (False, False)):
        model = tiny.language_model()
        pruneops.attach(model, PMoD(zero_init=zero_init, router_bias=bias))
        router = model.model.layers[2].router.router
        assert (router.bias is None) != bias and (not bias or not router.bias.any())
        assert (router.weight == 0).all() if zero_init else 0.05 < router.weight.std() < 0.5


def test_new_modules_take_dtype_and_mode_of_the_layer() -> None:
    model = tiny.language_model().bfloat16()
    pruneops.attach(model, PMoD())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model.modules())


def test_prune_needs_the_modules_and_runs_on_those_that_are_there() -> None:
    model = tiny.language_model()
    missing = "carries no mixture-of-depths layers.*pruneops.attach"
    with pytest.raises(ValueError, match=missing), pruneops.prune(model, PMoD()):
        pass
    ids = torch.tensor([ROWS[0]])
    inputs = {"input_ids": ids, "visual_token_mask": ids == tiny.IMAGE}
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        PMoD().prepare(model.model)
        trained(model)
        torch.testing.assert_close(model(input_ids=ids).logits, dense)  # unpruned, the layers are plain
        with pruneops.prune(model, PMoD()) as run:
            pruned = model(**inputs).logits
        assert run.layer_lengths[-1] == [10]
        torch.testing.assert_close(model(input_ids=ids).logits, dense)
        pruneops.attach(model, PMoD())  # on the same routers
        assert torch.equal(model(**inputs).logits, pruned)
        pruneops.detach(model)
    assert all(type(layer) is LlamaDecoderLayer for layer in model.model.layers)


def test_a_copy_of_an_attached_model_is_independent() -> None:
    model, _ = attached(tiny.llava())
    batch = tiny.llava_batch(ROWS[:1])
    with torch.no_grad():
        expected = model(**batch).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(**batch).logits, expected)
    assert pruneops.detach(twin) is twin
    assert all(type(layer) is LlamaDecoderLayer for layer in find_text_model(twin).layers)
    assert isinstance(find_text_model(model).layers[2], ModDecoderLayer)


def test_weights_go_from_one_attached_model_to_another() -> None:
    one, _ = attached(tiny.language_model())
    two = tiny.language_model(initializer_range=0.3)
    pruneops.attach(two, PMoD())
    two.load_state_dict(one.state_dict())
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        logits = [m(input_ids=ids, visual_token_mask=ids == tiny.IMAGE).logits for m in (one, two)]
    assert torch.equal(*logits)


def test_a_hook_on_a_decoder_layer_is_called_in_every_pass() -> None:
    """As libraries that gather sharded weights before a layer runs, and free them after it, rely on."""
    model = tiny.language_model()
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: seen.append("before"))
    model.model.layers[2].register_forward_hook(lambda *_: seen.append("after"))
    attached(model)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        cache = model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert seen == ["before", "after"] * 2


def test_an_attached_model_reports_its_tokens() -> None:
    model, run = attached(tiny.llava())
    with torch.no_grad():
        model(**tiny.llava_batch(ROWS[:1]))
    assert run.report().tokens == [24, 24, *(8 + k for k in KEPT_OF_16)]


# -- drop-in classes and their checkpoints -----------------------------------------------------------------------------


def saved(tmp_path: Path, method: PMoD) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = trained(tiny.llava(models.LlavaForConditionalGeneration, pruning=method))
    model.save_pretrained(tmp_path / "saved")
    return model, tiny.llava_batch(ROWS, "left")


@torch.no_grad()
def test_save_and_load_keep_method_and_routers(tmp_path: Path) -> None:
    model, batch = saved(tmp_path, PMoD(zero_init=False))
    again = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.pruning_run.method == PMoD(zero_init=False)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    pruneops.detach(again)
    again.save_pretrained(tmp_path / "plain")
    plain = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    assert plain.pruning_run is None and plain.state_dict().keys() == tiny.llava().state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("first", [None, PMoD(), PyramidDrop((2,), (0.5,))], ids=["none", "pmod", "pyramiddrop"])
def test_the_method_that_is_attached_when_a_model_is_saved_is_saved(first, tmp_path: Path) -> None:
    model = tiny.llava(models.LlavaForConditionalGeneration, pruning=first)
    if first is not None:
        pruneops.detach(model)
    model, _ = attached(model, PMoD("deep_all"))
    model.save_pretrained(tmp_path)
    again = models.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    batch = tiny.llava_batch(ROWS, "left")
    assert again.pruning_run.method == PMoD("deep_all")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_a_stock_checkpoint_gets_new_routers(tmp_path: Path) -> None:
    stock = tiny.llava()
    stock.save_pretrained(tmp_path)
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path, pruning=PMoD(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layer = find_text_model(model).layers[2]
    assert not layer.router.router.weight.any() and not layer.training
    weight = find_text_model(stock).layers[2].mlp.up_proj.weight
    assert torch.equal(layer.decoder_layer.mlp.up_proj.weight, weight.bfloat16())


@torch.no_grad()
def test_the_method_of_a_checkpoint_may_be_changed_where_its_routers_fit(tmp_path: Path) -> None:
    model, batch = saved(tmp_path, PMoD())
    load = models.LlavaForConditionalGeneration.from_pretrained
    other = load(tmp_path / "saved", pruning=PMoD(weight_norm="sigmoid"))
    assert other.config.pruning["weight_norm"] == "sigmoid"
    assert torch.equal(*(find_text_model(m).layers[3].router.router.weight for m in (model, other)))
    assert not torch.allclose(other(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="expected .2, 3, 4, 5., which the model carries"):
        load(tmp_path / "saved", pruning=PMoD("interleave"))
    drop = load(tmp_path / "saved", pruning=PyramidDrop((2,), (0.5,)))
    assert drop.state_dict().keys() == tiny.llava().state_dict().keys()
    weight = find_text_model(model).layers[2].decoder_layer.mlp.up_proj.weight
    assert torch.equal(find_text_model(drop).layers[2].mlp.up_proj.weight, weight)


def test_a_checkpoint_without_routers_or_with_broken_ones_is_refused(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, PMoD())
    find_text_model(model).layers[4].router.router.weight.data[0, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="layers.4.router.router.weight: got weights that are NaN"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "nan")
    tiny.llava().save_pretrained(tmp_path / "stock")
    config = tmp_path / "stock" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pruning": PMoD().to_dict()}))
    with pytest.raises(ValueError, match="no weights for 8 of the routers' parameters.*layers.2.router.router.bias"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock")


def test_anyres_checkpoints_keep_target_and_routers(tmp_path: Path) -> None:
    method = PMoD("deep_all", target="vision_hr")
    model = trained(tiny.llava_next(models.LlavaNextForConditionalGeneration, pruning=method))
    model.save_pretrained(tmp_path)
    again = models.LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.pruning == method.to_dict() and again.pruning_run.method.base_tokens == 16
    assert torch.equal(*(find_text_model(m).layers[3].router.router.weight for m in (model, again)))
