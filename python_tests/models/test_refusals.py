"""What cannot work, or is plainly wrong, is refused with an error that names argument, value and expectation."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache

import pruneops
from pruneops.cache import RaggedCache
from pruneops.methods import PyramidDrop, method_from_dict

DROP = PyramidDrop(layers=(2, 4), keep_ratios=(0.5, 0.25))
BATCH = tiny.llava_batch([tiny.row(3, 1, 5)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": (2, 4), "keep_ratios": (0.5,)}, ValueError, "keep_ratios: got 1 ratios for 2 layers"),
        (
            {"layers": (4, 2), "keep_ratios": (0.5, 0.25)},
            ValueError,
            r"layers: got \(4, 2\), expected strictly increasing",
        ),
        ({"layers": (2, 2), "keep_ratios": (0.5, 0.25)}, ValueError, "layers: got"),
        ({"layers": (0, 2), "keep_ratios": (0.5, 0.25)}, ValueError, "layers: got"),
        ({"layers": (2.5,), "keep_ratios": (0.5,)}, TypeError, "layers: got 2.5"),
        ({"layers": (True,), "keep_ratios": (0.5,)}, TypeError, "layers: got True"),
        ({"layers": 2, "keep_ratios": (0.5,)}, TypeError, "layers: got 2, expected a sequence"),
        ({"layers": (2,), "keep_ratios": 0.5}, TypeError, "keep_ratios: got 0.5, expected a sequence"),
        ({"layers": (2,), "keep_ratios": "5"}, TypeError, "keep_ratios: got '5'"),
        (
            {"layers": (2,), "keep_ratios": (0.0,)},
            ValueError,
            r"keep_ratios: got 0.0, expected a share in \(0, 1\]",
        ),
        ({"layers": (2,), "keep_ratios": (-0.5,)}, ValueError, "keep_ratios: got -0.5"),
        ({"layers": (2,), "keep_ratios": (1.5,)}, ValueError, "keep_ratios: got 1.5"),
        ({"layers": (2,), "keep_ratios": (float("nan"),)}, ValueError, "keep_ratios: got nan"),
        ({"layers": (2,), "keep_ratios": (None,)}, TypeError, "keep_ratios: got None"),
        ({"layers": (2, 4), "keep_ratios": (0.25, 0.5)}, ValueError, "expected ratios that do not increase"),
    ],
    ids=str,
)
def test_fields_of_pyramiddrop(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PyramidDrop(**arguments)


@pytest.mark.parametrize("layer", [6, 7, 100])
def test_layers_beyond_the_model(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layers: got {layer}, expected at most 5"):
        pruneops.attach(tiny.llava(), PyramidDrop((layer,), (0.5,)))


def test_a_model_too_shallow_for_default_stages() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 4 parts"):
        pruneops.attach(tiny.language_model(num_hidden_layers=2), PyramidDrop())


def test_models_that_are_not_supported() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(
        ValueError, match="model: got a GPT2LMHeadModel, expected one whose text model is one of LlamaModel"
    ):
        pruneops.attach(gpt2, DROP)
    with pytest.raises(ValueError, match="model: got a Linear"):
        pruneops.attach(torch.nn.Linear(2, 2), DROP)
    with pytest.raises(TypeError, match="model: got str"):
        pruneops.attach("llava-hf/llava-1.5-7b-hf", DROP)
    with pytest.raises(TypeError, match="method: got float"):
        pruneops.attach(tiny.llava(), 0.5)
    with pytest.raises(TypeError, match="method: got type"):
        pruneops.attach(tiny.llava(), PyramidDrop)


def test_methods_from_broken_dicts() -> None:
    assert method_from_dict(DROP.to_dict()) == DROP
    assert method_from_dict(PyramidDrop().to_dict()) == PyramidDrop()
    with pytest.raises(ValueError, match="method: got 'fastest', expected one of"):
        method_from_dict({"method": "fastest"})
    with pytest.raises(ValueError, match="method: got None"):
        method_from_dict({})
    with pytest.raises(ValueError, match=r"unknown fields \['ratio'\]"):
        method_from_dict({"method": "pyramiddrop", "ratio": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation: got 'static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation: got 'offloaded'"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: assisted decoding"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size: got 4"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: got True"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_generation_modes_that_need_equal_lengths(options: dict, message: str) -> None:
    model = tiny.llava()
    with pruneops.prune(model, DROP), pytest.raises(ValueError, match=message):
        model.generate(**BATCH, max_new_tokens=3, **options)


def test_assisted_decoding() -> None:
    model = tiny.llava()
    with (
        pruneops.prune(model, DROP),
        pytest.raises(ValueError, match="assistant_model: assisted decoding takes tokens back"),
    ):
        model.generate(**BATCH, max_new_tokens=3, assistant_model=tiny.language_model())


def test_caches_that_cannot_be_ragged() -> None:
    model = tiny.llava()
    filled = model(**BATCH, use_cache=True).past_key_values
    with pruneops.prune(model, DROP), torch.no_grad():
        with pytest.raises(ValueError, match="past_key_values: got a StaticCache"):
            model(**BATCH, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        with pytest.raises(ValueError, match="past_key_values: got a DynamicCache with 24 tokens"):
            model(input_ids=torch.tensor([[5]]), past_key_values=filled)
        with pytest.raises(ValueError, match="offloaded"):
            model(**BATCH, past_key_values=DynamicCache(config=model.config, offloading=True))
        ragged = model(**BATCH, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values: holds 1 rows, expected 2"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=ragged)
        with pytest.raises(ValueError, match="cannot be cropped"):
            ragged.crop(-1)
    with pytest.raises(ValueError, match="is not being pruned"):
        model(input_ids=torch.tensor([[5]]), past_key_values=ragged)


def test_a_cache_of_another_depth() -> None:
    model = tiny.llava()
    with pruneops.prune(model, DROP), pytest.raises(ValueError, match="RaggedCache of 3 layers, expected one of 6"):
        model(**BATCH, past_key_values=RaggedCache(3))


@pytest.mark.parametrize("tokens", [[[5]], [[5, 6, 7]]])
def test_gradients_through_a_filled_cache(tokens: list[list[int]]) -> None:
    """The forward pass works with gradients on, as it does when somebody forgets no_grad; backward says no."""
    model = tiny.llava()
    with pruneops.prune(model, DROP):
        cache = model(**BATCH, use_cache=True).past_key_values
        logits = model(input_ids=torch.tensor(tokens), past_key_values=cache).logits
        with pytest.raises(RuntimeError, match="a pass on a filled cache has no gradient"):
            logits.sum().backward()


def test_a_generation_config_given_by_position_is_looked_at_too() -> None:
    from transformers import GenerationConfig

    model = tiny.llava()
    config = GenerationConfig(cache_implementation="static", max_new_tokens=3)
    with pruneops.prune(model, DROP), pytest.raises(ValueError, match="cache_implementation: got 'static'"):
        model.generate(BATCH["input_ids"], config, pixel_values=BATCH["pixel_values"])


def test_training_without_labels_is_pointed_out() -> None:
    model = tiny.llava().train()
    with pruneops.prune(model, DROP), pytest.warns(UserWarning, match="training without labels"):
        model(**BATCH)


def test_attention_maps() -> None:
    model = tiny.llava()
    with (
        pruneops.prune(model, DROP),
        pytest.raises(ValueError, match="output_attentions: got True, expected False"),
    ):
        model(**BATCH, output_attentions=True)


def test_attention_dropout_in_training() -> None:
    model = tiny.language_model(attention_dropout=0.1).train()
    ids = torch.tensor([[5, 6, 7]])
    with pruneops.prune(model, DROP):
        with pytest.raises(ValueError, match="attention_dropout: got 0.1, expected 0"):
            model(input_ids=ids)
        model.eval()(input_ids=ids)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sequences_longer_than_the_sliding_window(family: str) -> None:
    extra = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    model = tiny.language_model(family, sliding_window=8, **extra)
    with pruneops.prune(model, DROP), torch.no_grad():
        model(input_ids=torch.tensor([list(range(2, 10))]))
        with pytest.raises(ValueError, match="sliding_window: the model attends 8 tokens back and the batch is 9"):
            model(input_ids=torch.tensor([list(range(2, 11))]))
        with pytest.raises(ValueError, match="sliding_window"):
            model.generate(torch.tensor([list(range(2, 10))]), max_new_tokens=3)


def test_the_attention_function_outside_the_ragged_decoder() -> None:
    model = tiny.language_model()
    model.set_attn_implementation("pruneops")
    with pytest.raises(ValueError, match="works inside the ragged decoder only"):
        model(input_ids=torch.tensor([[5, 6]]))


def test_placeholders_that_do_not_match_the_images() -> None:
    model = tiny.llava()
    with pruneops.prune(model, DROP):
        with pytest.raises(ValueError, match="15"):
            model(input_ids=torch.tensor([[5] + [tiny.IMAGE] * 15 + [6]]), pixel_values=tiny.pixels(1))
        with pytest.raises(ValueError, match="placeholders of image 0 are spread over two rows"):
            ids = [[5] + [tiny.IMAGE] * 8 + [6], [5] + [tiny.IMAGE] * 8 + [6]]
            model(input_ids=torch.tensor(ids), pixel_values=tiny.pixels(1))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "visual_token_mask",
            torch.ones(1, 5, dtype=torch.bool)[0],
            ValueError,
            "visual_token_mask: got shape",
        ),
        ("visual_token_mask", torch.ones(2, 5, dtype=torch.bool), ValueError, "visual_token_mask: got shape"),
        ("visual_token_mask", torch.ones(1, 5), TypeError, "visual_token_mask: got torch.float32"),
        (
            "visual_token_mask",
            torch.tensor([[0, -1, 0, 0, 0]]),
            ValueError,
            "visual_token_mask: got the value -1",
        ),
        (
            "visual_token_mask",
            torch.tensor([[0, 1, 2, 1, 0]]),
            ValueError,
            "image 1 of a row overlaps another",
        ),
        ("visual_token_mask", torch.tensor([[0, 2, 0, 1, 0]]), ValueError, "comes before a lower number"),
        ("visual_token_mask", [[0, 1, 1, 1, 0]], TypeError, "visual_token_mask: got list"),
        (
            "attention_mask",
            torch.ones(1, 1, 5, 5),
            ValueError,
            "attention_mask: got shape .* 4-D masks cannot be packed",
        ),
        ("attention_mask", torch.ones(1, 4), ValueError, "attention_mask: got 4 columns, expected 5"),
        ("attention_mask", torch.ones(1, 6), ValueError, "attention_mask: got 6 columns"),
        (
            "position_ids",
            torch.tensor([[0, 1, 0, 1, 2]]),
            ValueError,
            "position_ids: got positions that decrease",
        ),
        ("position_ids", torch.zeros(3, 1, 5, dtype=torch.long), ValueError, "position_ids: got shape"),
        ("cu_seq_lens_q", torch.tensor([0, 2, 5], dtype=torch.int32), ValueError, "cu_seq_lens_q"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_of_a_language_model(name: str, value: object, error: type[Exception], message: str) -> None:
    model = tiny.language_model()
    with pruneops.prune(model, DROP), pytest.raises(error, match=message):
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), **{name: value})


def test_ids_and_embeddings_together_or_neither() -> None:
    model = tiny.language_model()
    with pruneops.prune(model, DROP):
        with pytest.raises(ValueError, match="got both or neither"):
            model()
        with pytest.raises(ValueError, match="got both or neither"):
            model(input_ids=torch.tensor([[5]]), inputs_embeds=torch.zeros(1, 1, 32))


def test_embeddings_without_a_visual_token_mask_are_pointed_out() -> None:
    model = tiny.llava()
    embeds = torch.randn(1, 5, 32)
    with pruneops.prune(model, DROP), pytest.warns(UserWarning, match="no token is known to be visual"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
