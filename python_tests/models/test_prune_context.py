"""prune, attach and detach leave a model exactly as they found it."""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny
import torch
from torch import nn

import pruneops
from pruneops.methods import PyramidDrop

DROP = PyramidDrop(layers=(2, 4), keep_ratios=(0.5, 0.25))


def fingerprint(model: nn.Module) -> dict:
    """Everything that patching could touch: attributes of all modules, configs, weights."""
    return {
        "attributes": {name: {k: id(v) for k, v in module.__dict__.items()} for name, module in model.named_modules()},
        "configs": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "config": model.config.to_json_string(),
        "weights": {k: (id(v), v._version) for k, v in model.state_dict(keep_vars=True).items()},
    }


def warm(model: nn.Module) -> nn.Module:
    """Transformers adds hooks of its own to the vision tower the first time that hidden states are asked for."""
    with torch.no_grad():
        model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
    return model


@pytest.mark.parametrize("build", [tiny.llava, tiny.llava_next, tiny.language_model], ids=lambda f: f.__name__)
def test_the_model_is_exactly_restored(build) -> None:
    model = build()
    before = fingerprint(model)
    with pruneops.prune(model, DROP):
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_the_model_is_restored_after_an_error() -> None:
    model = warm(tiny.llava())
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), pruneops.prune(model, DROP):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="image"), pruneops.prune(model, DROP):
        model(input_ids=torch.tensor([[tiny.IMAGE, 5]]), pixel_values=tiny.pixels(1))
    assert fingerprint(model) == before


def test_a_failed_prune_leaves_the_model_alone() -> None:
    model = tiny.llava()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="layers"):
        pruneops.attach(model, PyramidDrop((99,), (0.5,)))
    assert fingerprint(model) == before


def test_blocks_may_follow_each_other_and_the_method_may_change() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch([tiny.row(3, 1, 5)])
    lengths = []
    for ratios in ((1.0, 1.0), (0.5, 0.25), (1.0, 1.0)):
        with torch.no_grad(), pruneops.prune(model, PyramidDrop((2, 4), ratios)) as run:
            model(**batch)
        lengths.append([n for (n,) in run.layer_lengths])
    assert lengths == [[24] * 6, [24, 24, 16, 16, 12, 12], [24] * 6]


def test_a_context_may_be_entered_again() -> None:
    model = warm(tiny.llava())
    before = fingerprint(model)
    context = pruneops.prune(model, DROP)
    for _ in range(2):
        with context as run, torch.no_grad():
            model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
        assert run is context and run.layer_lengths[-1] == [12]
        assert fingerprint(model) == before
    with context, pytest.raises(ValueError, match="already pruned"), context:
        pass
    assert fingerprint(model) == before


def test_nesting_is_refused_and_harmless() -> None:
    model = warm(tiny.llava())
    before = fingerprint(model)
    with pruneops.prune(model, DROP) as run:
        with pytest.raises(ValueError, match="already pruned"), pruneops.prune(model, DROP):
            pass
        with pytest.raises(ValueError, match="already pruned"):
            pruneops.attach(model.model.language_model, DROP)
        with torch.no_grad():
            model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
        assert run.layer_lengths[-1] == [12]
    assert fingerprint(model) == before


def test_two_models_may_be_pruned_at_once() -> None:
    one, two = tiny.llava(), tiny.language_model()
    with (
        pruneops.prune(one, DROP) as run_one,
        pruneops.prune(two, PyramidDrop((3,), (0.25,))) as run_two,
        torch.no_grad(),
    ):
        one(**tiny.llava_batch([tiny.row(3, 1, 5)]))
        ids = torch.tensor([tiny.row(3, 1, 5)])
        two(input_ids=ids, visual_token_mask=ids == tiny.IMAGE)
    assert run_one.layer_lengths[-1] == [12] and run_two.layer_lengths[-1] == [12]
    assert run_one.layer_lengths[2] == [16] and run_two.layer_lengths[2] == [24]


def test_attach_lasts_until_detach() -> None:
    model = warm(tiny.llava())
    before = fingerprint(model)
    run = pruneops.attach(model, DROP)
    with torch.no_grad():
        model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
    assert run.layer_lengths[-1] == [12]
    assert pruneops.detach(model) is model
    assert fingerprint(model) == before
    with pytest.raises(ValueError, match="nothing is attached"):
        pruneops.detach(model)


def test_generate_may_be_asked_for_its_arguments() -> None:
    model = tiny.language_model()
    stock = inspect.signature(model.forward).parameters
    with pruneops.prune(model, DROP):
        assert list(inspect.signature(model.forward).parameters) == [
            *list(stock)[:-1],
            "visual_token_mask",
            "num_frames",
            list(stock)[-1],
        ]
        ids = torch.tensor([tiny.row(3, 1, 5)])
        sequences = model.generate(ids, visual_token_mask=ids == tiny.IMAGE, max_new_tokens=3)
        assert sequences.shape == (1, 27)
        with pytest.raises(ValueError, match="visual_token_masc"):
            model.generate(ids, visual_token_masc=ids == tiny.IMAGE, max_new_tokens=3)


def test_a_copy_of_a_pruned_model_is_pruned_and_independent() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch([tiny.row(3, 1, 5)])
    with torch.no_grad(), pruneops.prune(model, DROP):
        expected = model(**batch).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(**batch).logits, expected)
        assert not model(**batch).logits.any()
    assert pruneops.detach(twin) is twin


def test_a_hook_that_another_library_put_on_the_model_is_kept_and_called() -> None:
    """accelerate puts an instance attribute `forward` on the modules it dispatches."""
    model = tiny.llava()
    calls = []
    stock = model.forward

    def hooked(*args, **kwargs):
        calls.append("hooked")
        return stock(*args, **kwargs)

    model.forward = hooked
    with torch.no_grad(), pruneops.prune(model, DROP) as run:
        model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
    assert calls == ["hooked"] and run.layer_lengths[-1] == [12]
    assert model.forward is hooked


def test_a_model_may_be_wrapped() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            return self.module(**kwargs)

    model = Wrapper(tiny.llava())
    with torch.no_grad(), pruneops.prune(model, DROP) as run:
        model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
    assert run.layer_lengths[-1] == [12]


def test_the_head_is_found_behind_a_wrapper_that_forwards_attributes() -> None:
    """As torch.compile's wrapper does: labels have to reach the ranking all the same."""

    class Forwarding(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

        def __getattr__(self, name: str):
            if name == "_orig_mod":
                return super().__getattr__(name)
            return getattr(self._orig_mod, name)

        def forward(self, **kwargs):
            return self._orig_mod(**kwargs)

    model = tiny.language_model()
    ids = torch.tensor([tiny.row(3, 1, 5)])
    inputs = {"input_ids": ids, "visual_token_mask": ids == tiny.IMAGE, "labels": torch.full_like(ids, -100)}
    with torch.no_grad(), pruneops.prune(Forwarding(model), DROP) as run:
        model(**inputs)
    assert run.layer_lengths == [[24]] * tiny.LAYERS  # no answer in the labels: the row is left alone


def test_a_model_that_shares_its_config_with_a_pruned_one_is_not_affected() -> None:
    one = tiny.language_model()
    two = type(one)(one.config).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = two(input_ids=ids).logits
        first, second = pruneops.attach(one, DROP), pruneops.prune(two, DROP)
        torch.testing.assert_close(two(input_ids=ids).logits, expected)
        second.install()
        first.remove()
        second.remove()
        torch.testing.assert_close(two(input_ids=ids).logits, expected)
    assert one.config._attn_implementation == two.config._attn_implementation != "pruneops"


def test_a_cache_filled_in_inference_mode_may_be_continued_outside_of_it() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch([tiny.row(3, 1, 5)])
    with pruneops.prune(model, DROP):
        with torch.inference_mode():
            cache = model(**batch, use_cache=True).past_key_values
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
            fresh = model(**batch, use_cache=True).past_key_values
            torch.testing.assert_close(logits, model(input_ids=torch.tensor([[5]]), past_key_values=fresh).logits)


def test_an_empty_dynamic_cache_of_the_caller_is_filled_in_place() -> None:
    from transformers import DynamicCache

    model = tiny.llava()
    batch = tiny.llava_batch([tiny.row(3, 1, 5)])
    with pruneops.prune(model, DROP):
        cache = DynamicCache(config=model.config)
        outputs = model.generate(**batch, past_key_values=cache, max_new_tokens=4, return_dict_in_generate=True)
        assert outputs.past_key_values is cache
        assert cache.get_seq_length() == 27 and cache.lengths(5) == [15]


def test_report_needs_a_prompt_first() -> None:
    model = tiny.llava()
    with pruneops.prune(model, DROP) as run:
        with pytest.raises(ValueError, match="has not seen a prompt"):
            run.report()
        with torch.no_grad():
            model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
        assert "24" in str(run.report()) and len(run.layer_seconds) == tiny.LAYERS


def test_records_are_kept_on_request_only() -> None:
    model = tiny.llava()
    with torch.no_grad(), pruneops.prune(model, DROP) as run:
        model(**tiny.llava_batch([tiny.row(3, 1, 5)]))
    assert run.records == []
