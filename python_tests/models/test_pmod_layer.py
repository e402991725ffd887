"""The mixture-of-depths layer at its edges: nothing to run on, and what other libraries do to its parts."""

from __future__ import annotations

import functools
import pickle

import pytest
import tiny
import torch
from pmod_models import ROWS, attached
from torch import nn

import pruneops
from pruneops.methods import PMoD, PyramidDrop

IDS = torch.tensor([ROWS[0]])
INPUTS = {"input_ids": IDS, "visual_token_mask": IDS == tiny.IMAGE}
#: Of three tokens none goes through layers 2, 3 and 4.
NONE_OF_3 = PMoD("deep_all", target="all", router_factor=0.3)
PYRAMID_DROP = PyramidDrop((2,), (0.5,))


# -- nothing goes through ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parity", [False, True])
def test_where_nothing_goes_through_a_layer_it_only_weights(parity: bool, checkpointing: bool) -> None:
    model, run = attached(tiny.language_model().train(), PMoD(**{**vars(NONE_OF_3), "parity": parity}))
    if checkpointing:
        model.gradient_checkpointing_enable()
    outputs = model(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert run.layer_lengths == [[3], [3], [0], [0], [0], [3]] and run.report().tokens == [3, 3, 0, 0, 0, 3]
    for i in (2, 3, 4):
        before = outputs.hidden_states[i]
        weight = 0.2 * model.model.layers[i].router.router(before).tanh() + 1
        torch.testing.assert_close(outputs.hidden_states[i + 1], weight * before)
    outputs.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        skipped = any(f".{i}.decoder_layer." in name for i in (2, 3, 4))
        assert parameter.grad is not None and bool(parameter.grad.any()) != skipped, name


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_of_which_nothing_goes_through_generates_the_same_alone_and_in_a_batch(use_cache: bool) -> None:
    model, _ = attached(tiny.language_model(), NONE_OF_3)
    rows = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11], [8]]
    options = {"max_new_tokens": 5, "use_cache": use_cache, "eos_token_id": None}
    together = model.generate(**tiny.pad(rows, "left"), **options)[:, -5:]
    alone = [model.generate(input_ids=torch.tensor([row]), **options)[0, -5:] for row in rows]
    assert together.tolist() == torch.stack(alone).tolist()


@torch.no_grad()
def test_a_second_turn_of_which_nothing_goes_through_leaves_the_cache_alone() -> None:
    model, run = attached(tiny.language_model(), PMoD("deep_all", router_factor=0.4))
    cache = model(**INPUTS, use_cache=True).past_key_values
    held = cache.lengths(3)
    images = torch.full((1, 2), tiny.IMAGE)
    model(input_ids=images, visual_token_mask=images == tiny.IMAGE, past_key_values=cache)
    assert run.layer_lengths[3] == [0] and cache.lengths(3) == held
    assert cache.next_positions(3) == [IDS.shape[1] + 2]
    model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert cache.lengths(3) == [held[0] + 1]


@pytest.mark.parametrize("method", [PMoD(), PYRAMID_DROP], ids=["pmod", "pyramiddrop"])
@torch.no_grad()
def test_a_batch_of_nothing_but_padding_gives_zeros(method) -> None:
    model = tiny.language_model()
    pruneops.attach(model, method)
    assert not model(input_ids=IDS, attention_mask=torch.zeros_like(IDS), use_cache=True).logits.any()


# -- other libraries ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_that_are_in_but_do_not_prune_are_the_stock_layers() -> None:
    model = tiny.language_model()
    expected = model(input_ids=IDS, output_hidden_states=True).hidden_states
    PMoD().prepare(model.model)
    seen = []
    model.model.layers[3].decoder_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    hidden_states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(hidden_states, expected, strict=True))
    assert torch.equal(seen[0], expected[4])


@pytest.mark.parametrize("activation", ["tanh", "softmax"])
@torch.no_grad()
def test_hooks_and_replaced_forwards_of_a_router_take_effect(activation: str) -> None:
    """As libraries that keep weights elsewhere until they are needed rely on."""
    model, _ = attached(tiny.language_model(), PMoD(weight_norm=activation))
    expected = model(**INPUTS).logits
    router = model.model.layers[3].router
    seen = []
    router.register_forward_pre_hook(lambda *_: seen.append("router"))
    router.router.register_forward_pre_hook(lambda *_: seen.append("linear"))
    torch.testing.assert_close(model(**INPUTS).logits, expected)
    stock = model.model.layers[4].router.router.forward
    model.model.layers[4].router.router.forward = lambda x: seen.append("forward") or stock(x)
    torch.testing.assert_close(model(**INPUTS).logits, expected)
    assert seen == ["router", "linear", "router", "linear", "forward"]


@torch.no_grad()
def test_routers_may_be_float32_in_a_bfloat16_model() -> None:
    model, _ = attached(tiny.language_model().bfloat16())
    expected = model(**INPUTS).logits
    for i in (2, 3, 4, 5):
        model.model.layers[i].router.float()
    logits = model(**INPUTS).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_forward_wrapped_while_attached_may_be_unwrapped_after_detach() -> None:
    model = tiny.language_model()
    expected = model(input_ids=IDS).logits
    layer = model.model.layers[3]
    pruneops.attach(model, PMoD())
    layer.kept = layer.forward
    layer.forward = functools.partial(lambda layer, *args, **kwargs: layer.kept(*args, **kwargs), layer)
    model(**INPUTS)
    pruneops.detach(model)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    layer.forward = layer.kept
    assert torch.equal(model(input_ids=IDS).logits, expected)
    pruneops.attach(model, PMoD())
    pruneops.detach(model)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def replaced_forward(model: nn.Module) -> None:
    model.model.layers[3].forward = lambda *args, **kwargs: None


def one_layer_twice(model: nn.Module) -> None:
    model.model.layers[4] = model.model.layers[3]


def offloaded(model: nn.Module) -> None:
    norm = model.model.layers[3].to("meta").input_layernorm
    norm.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_forward, "whose forward was replaced"),
        (one_layer_twice, "occurs twice"),
        (offloaded, "weights are offloaded"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers_that_would_be_bypassed_are_refused_and_the_model_is_left_as_it_was(change, message: str) -> None:
    model = tiny.language_model()
    change(model)
    modules = dict(model.named_modules())
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        pruneops.attach(model, PMoD())
    assert dict(model.named_modules()) == modules
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes


def test_new_modules_that_fail_the_check_are_taken_out_again() -> None:
    model = tiny.language_model()
    model.config.__dict__["initializer_range"] = float("inf")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="layers.2.router.router.weight: got weights that are NaN or infinite"):
        pruneops.attach(model, PMoD(zero_init=False))
    assert dict(model.named_modules()) == modules


@torch.no_grad()
def test_a_model_can_be_pickled_unless_it_is_being_pruned() -> None:
    model, run = attached(tiny.language_model())
    with pytest.raises(TypeError, match="being pruned to pickle.*pruneops.detach"):
        pickle.dumps(model)
    expected = model(**INPUTS).logits
    run.remove()
    again = pickle.loads(pickle.dumps(model))
    pruneops.attach(again, PMoD())
    assert torch.equal(again(**INPUTS).logits, expected)
    pruneops.detach(again)
    assert pickle.loads(pickle.dumps(again))(input_ids=IDS).logits.shape == expected.shape


def test_a_backward_pass_does_not_touch_the_trace_of_a_later_pass() -> None:
    model, run = attached(tiny.language_model().train())
    model.gradient_checkpointing_enable()
    loss = model(**INPUTS, labels=IDS).loss

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**INPUTS)
    hook.remove()
    loss.backward()
    assert len(run.layer_lengths) == 3
