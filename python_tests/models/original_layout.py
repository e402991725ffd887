"""Writes tiny random checkpoints exactly as the authors of p-MoD and Dynamic-LLaVA publish theirs, and builds the same
models by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, PreTrainedTokenizerFast

import pruneops
from pruneops.methods import PMoD, PruningMethod
from pruneops.methods.dynamic_llava import predictors_of

#: The published schedule reaches layer 8 first: 12 layers have 4 mixture-of-depths layers.
LAYERS, HIDDEN, VOCAB = 12, 32, 259
MOD_LAYERS = (8, 9, 10, 11)
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 64,
}
METHOD = {
    "mod_target_layers": "shiftedcos_decay_0.85_0.15",
    "mod_target_token_type": "vision_all",
    "mod_router_factor": 0.5,
    "mod_weight_norm": "tanh_0.2_1",
    "mod_bias_enabled": True,
    "mod_special_init": True,
    "mod_target_layer_indices": list(MOD_LAYERS),
}
#: The other method, and what its config says beside it.
SPARSE = {
    "use_vision_predictor": True,
    "vision_keep_rate": 0.3,
    "use_text_predictor": True,
    "use_output_text_predictor": True,
    "output_text_keep_rate": 0.5,
    "output_text_len_for_training": 50,
    "use_instruct_predictor": False,
    "instruct_keep_rate": 0.7,
    "instruct_len_for_training": 25,
    "sparse_layer": 2,
    "d_model": 16,
    "nhead": 2,
    "dim_feedforward": 24,
    "num_layers": 2,
    "mask_loss_weight": 100.0,
}
#: Of 16 image tokens.
KEPT = 4
DYNAMIC = {
    "sparse_config": SPARSE,
    "model_type": "llava_llama",
    "architectures": ["DynamicLlavaLlamaForCausalLM"],
    "_name_or_path": "liuhaotian/llava-v1.5-7b",
}


def original_config(anyres: bool, dynamic: bool = False, **changes: Any) -> dict[str, Any]:
    config = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["PmodLlavaLlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_aspect_ratio": "anyres" if anyres else "pad",
        # (width, height), as LLaVA writes them.
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]] if anyres else None,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_num_sub_images": 4,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 64,
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        **METHOD,
        "model_type": "pmod_llava_llama",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCAB,
    }
    if dynamic:
        config = {key: value for key, value in config.items() if key not in METHOD} | DYNAMIC
    return {**config, **changes}


def _layer_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}self_attn.k_proj.weight": (16, HIDDEN),
        f"{prefix}self_attn.v_proj.weight": (16, HIDDEN),
        f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}mlp.gate_proj.weight": (48, HIDDEN),
        f"{prefix}mlp.up_proj.weight": (48, HIDDEN),
        f"{prefix}mlp.down_proj.weight": (HIDDEN, 48),
        f"{prefix}input_layernorm.weight": (HIDDEN,),
        f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
    }


def tower_shapes() -> dict[str, tuple[int, ...]]:
    """CLIP's vision model, by the names it has in CLIP checkpoints."""
    prefix = "vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.class_embedding": (64,),
        f"{prefix}embeddings.patch_embedding.weight": (64, 3, 4, 4),
        f"{prefix}embeddings.position_embedding.weight": (17, 64),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{prefix}{name}.weight": (64,), f"{prefix}{name}.bias": (64,)}
    for i in range(2):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (64, 64), f"{layer}self_attn.{name}.bias": (64,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (64,), f"{layer}{name}.bias": (64,)}
        shapes |= {f"{layer}mlp.fc1.weight": (48, 64), f"{layer}mlp.fc1.bias": (48,)}
        shapes |= {f"{layer}mlp.fc2.weight": (64, 48), f"{layer}mlp.fc2.bias": (64,)}
    return shapes


def predictor_shapes(instruct: bool) -> dict[str, tuple[int, ...]]:
    """The predictors of Dynamic-LLaVA, with one for the question or without."""
    image, d = "model.image_score_predictor.", 16
    shapes: dict[str, tuple[int, ...]] = {
        f"{image}down_mlp.0.weight": (HIDDEN,),
        f"{image}down_mlp.0.bias": (HIDDEN,),
        f"{image}down_mlp.1.weight": (d, HIDDEN),
        f"{image}down_mlp.1.bias": (d,),
    }
    for j in range(2):
        block = f"{image}transformer.{j}."
        for name in ("norm1", "norm2"):
            shapes |= {f"{block}{name}.weight": (d,), f"{block}{name}.bias": (d,)}
        shapes |= {f"{block}attn.qkv.weight": (3 * d, d)}
        shapes |= {f"{block}attn.proj.weight": (d, d), f"{block}attn.proj.bias": (d,)}
        shapes |= {f"{block}mlp.fc1.weight": (24, d), f"{block}mlp.fc1.bias": (24,)}
        shapes |= {f"{block}mlp.fc2.weight": (d, 24), f"{block}mlp.fc2.bias": (d,)}
    for i, (wide, narrow) in {0: (d, 8), 2: (8, 4), 4: (4, 2)}.items():
        shapes |= {f"{image}output_mlp.{i}.weight": (narrow, wide), f"{image}output_mlp.{i}.bias": (narrow,)}
    for name in ("output_text", *(["instruct"] if instruct else [])):
        mlp = f"model.{name}_score_predictor.output_mlp."
        shapes |= {f"{mlp}0.weight": (HIDDEN,), f"{mlp}0.bias": (HIDDEN,)}
        for i, (wide, narrow) in {1: (HIDDEN, d), 3: (d, 8), 5: (8, 4), 7: (4, 2)}.items():
            shapes |= {f"{mlp}{i}.weight": (narrow, wide), f"{mlp}{i}.bias": (narrow,)}
    return shapes


def original_shapes(
    anyres: bool, tower: bool = True, dynamic: bool = False, instruct: bool = False
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an original checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        if i in MOD_LAYERS and not dynamic:
            shapes |= _layer_shapes(f"model.layers.{i}.decoder_layer.")
            shapes |= {f"model.layers.{i}.router.router.weight": (1, HIDDEN)}
            shapes |= {f"model.layers.{i}.router.router.bias": (1,)}
        else:
            shapes |= _layer_shapes(f"model.layers.{i}.")
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes |= {"model.mm_projector.0.weight": (HIDDEN, 64), "model.mm_projector.0.bias": (HIDDEN,)}
    shapes |= {"model.mm_projector.2.weight": (HIDDEN, HIDDEN), "model.mm_projector.2.bias": (HIDDEN,)}
    if anyres:
        shapes["model.image_newline"] = (HIDDEN,)
    if dynamic:
        shapes |= predictor_shapes(instruct)
    if tower:
        shapes |= {f"model.vision_tower.vision_tower.{name}": shape for name, shape in tower_shapes().items()}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        draw = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.1 * draw
        return draw if len(shape) < 2 else draw / (shape[-1] ** 0.5)

    return {name: tensor(name, shape).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, tensors: dict[str, Tensor], kind: str) -> None:
    """Tensors as ``kind`` says: ``safetensors`` or ``bin``, ``sharded-`` before it for three files and an index."""
    suffix = kind.removeprefix("sharded-")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(tensors)
    parts = [names[i::3] for i in range(3)] if kind.startswith("sharded-") else [names]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}.{suffix}" if len(parts) == 1 else f"{stem}-{number:05d}-of-00003.{suffix}"
        values = {name: tensors[name].clone() for name in part}
        if suffix == "safetensors":
            save_file(values, folder / file, metadata={"format": "pt"})
        else:
            torch.save(values, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Vicuna's three special ones; no image token, as in original LLaVA."""
    specials = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(tokenizer_models.BPE(vocab={t: i for i, t in enumerate(specials + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="right",
        model_max_length=2048,
    )


def write_original(
    folder: Path,
    anyres: bool = False,
    kind: str = "safetensors",
    tower: bool = True,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = True,
    dynamic: bool = False,
    **changes: Any,
) -> dict[str, Tensor]:
    """An original checkpoint in `folder`; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    instruct = bool((changes.get("sparse_config") or SPARSE)["use_instruct_predictor"])
    tensors = random_tensors(original_shapes(anyres, tower, dynamic, instruct), dtype)
    save(folder, tensors, kind)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    config = original_config(anyres, dynamic, torch_dtype=str(dtype).removeprefix("torch."), **changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096})
    )
    return tensors


def write_tower(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A CLIP checkpoint with a text half that nobody asks for; returns the tensors of the vision half."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(tower_shapes(), dtype)
    other = {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.ones(())}
    save(folder, {**tensors, **other}, "safetensors")
    CLIPVisionConfig(**TOWER).save_pretrained(folder)
    return tensors


def by_hand(
    tensors: dict[str, Tensor], anyres: bool, image_token_id: int = VOCAB, method: PruningMethod | None = None
) -> Any:
    """The stock model of an original checkpoint: weights put into place one by one, the method (p-MoD) attached."""
    import transformers

    text = LlamaConfig(
        vocab_size=image_token_id + 1,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    settings = {
        "text_config": text,
        "vision_config": CLIPVisionConfig(**TOWER),
        "image_token_id": image_token_id,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": 16,
    }
    if anyres:
        # (height, width), as transformers writes them.
        pinpoints = [[32, 16], [16, 32], [32, 32], [16, 48], [48, 16]]
        config = LlavaNextConfig(image_grid_pinpoints=pinpoints, **settings)
        model = transformers.LlavaNextForConditionalGeneration(config)
    else:
        model = transformers.LlavaForConditionalGeneration(LlavaConfig(**settings))
    model.eval()
    pruneops.attach(model, method or PMoD(parity=True))
    inner, language = model.model, model.model.language_model

    def put(module: torch.nn.Module, prefix: str) -> None:
        values = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(values)

    for i, layer in enumerate(language.layers):
        put(layer, f"model.layers.{i}.")
    put(language.norm, "model.norm.")
    for name, predictor in predictors_of(language).items():
        put(predictor, f"model.{name}.")
    projector = inner.multi_modal_projector
    put(projector.linear_1, "model.mm_projector.0.")
    put(projector.linear_2, "model.mm_projector.2.")
    put(
        getattr(inner.vision_tower, "vision_model", inner.vision_tower), "model.vision_tower.vision_tower.vision_model."
    )
    with torch.no_grad():
        for module, name in ((language.embed_tokens, "model.embed_tokens"), (model.lm_head, "lm_head")):
            module.weight[:VOCAB] = tensors[f"{name}.weight"]
            module.weight[VOCAB:] = 0
        if anyres:
            inner.image_newline.copy_(tensors["model.image_newline"])
    return model
