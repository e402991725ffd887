"""Makes the folder of a model that ships with pruneops out of one that train_llava.py wrote.

    python examples/ship_llava.py --from runs/dense --to pruneops/assets/scene_llava --eval bench/results/eval.json

The model card says how often the model is right if `pruneops eval` has asked a model of the source's name. Weights are
stored in half precision; loaded, they compute in float32 as they were trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from pruneops.data import scene_processor
from pruneops.evaluation import Exam
from pruneops.evaluation.results import Entry
from pruneops.evaluation.ways import DENSE, OWN
from pruneops.methods import PyramidDrop, method_from_dict
from pruneops.models.scene import TRAINING_KEY

NOTE = "trained on rendered pictures of small shapes and signs only; of any other picture its answers mean nothing"
#: What only the training of the vision tower needs: weights, and an entry of the config.
HEADS, WORDS = "patch_heads.", "patch_words"

STOCK_IMPORTS = "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
METHOD_IMPORTS = "from transformers import AutoProcessor\n\nfrom pruneops.models import LlavaForConditionalGeneration"
CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
---

# Scene LLaVA{title}

A LLaVA of {millions:.1f} million weights, small enough to ship with pruneops:
**{note}**.
It exists so that what pruning visual tokens does to answers can be seen, tested and measured on a laptop, and has no
other use.

* **Architecture**: `LlavaForConditionalGeneration` of Hugging Face transformers: a CLIP tower of {vision_layers} layers
  (the last is not used, as in LLaVA 1.5), a projector, and a Llama of {layers} layers with a width of {width}.
  A picture is {side} x {side} pixels and {tokens} visual tokens.
* **Tokenizer**: a word of the pictures' questions and answers is a token, every other text is spelled in bytes.
* **Training**: from nothing, by the stages of `examples/train_llava.py`, on pictures of the split "train" that
  `pruneops.data` renders: coloured shapes of the size of a patch and signs of two, on a busy background. It saw no
  other picture and no other text.{method}{training}
* **Weights**: stored in {dtype}, computed with in float32 unless `dtype` says otherwise.

## Use

```python
from PIL import Image
{imports}
from pruneops.data import Samples
from pruneops.models.scene import scene_llava_folder

folder = scene_llava_folder({argument})
model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
sample = Samples("test", 1, seed=7)[0]
message = {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": sample.turns[0].text}}]}}
prompt = processor.apply_chat_template([message], add_generation_prompt=True)
inputs = processor(images=Image.fromarray(sample.pictures[0]), text=prompt, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=16)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), "/", sample.turns[0].answer)
```

## Accuracy

{accuracy}

## Limits

It reads what `pruneops.data` renders and answers the questions that come with the pictures, in the words that it was
trained on. Shown anything else, it answers in the same words, and they mean nothing. Nothing about the accuracy of
large models under pruning follows from its own.
"""


def ship(source: Path, target: Path, dtype: str = "float16", figures: Mapping[str, Any] | None = None) -> Path:
    """Write model, processor and model card.

    Parameters
    ----------
    source : Path
        What train_llava.py wrote, with any method.
    target : Path
        Created if needed; files of the same names are replaced.
    dtype : str
        Of the stored weights: "float16", "bfloat16" or "float32".
    figures : mapping, optional
        What was measured. ``accuracy``: the share of right answers by the name of a method, or "dense"; ``questions``:
        how many were asked; ``templates``: the same shares by the kind of question (name to name to share);
        ``training``: a sentence for the model card.

    Returns
    -------
    Path
        The target.

    Raises
    ------
    ValueError
        If the source has no weights in one file or is no model for the data set's pictures, or a share is none.
    """
    weights, config = _read(source)
    figures = dict(figures or {})
    for name, share in figures.get("accuracy", {}).items():
        if not 0 <= share <= 1:
            raise ValueError(f"accuracy: got {share} for {name}, expected a share in [0, 1]")
    stored = {
        name: tensor.to(getattr(torch, dtype)).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if not name.startswith(HEADS)
    }
    broken = [name for name, tensor in stored.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"weights: got values in {broken[0]} that are not finite in {dtype}, expected none")
    config.pop(WORDS, None)
    config["architectures"], config["dtype"] = ["LlavaForConditionalGeneration"], "float32"
    config[TRAINING_KEY] = {"note": NOTE} | {key: figures[key] for key in ("questions", "accuracy") if key in figures}
    vision = config["vision_config"]
    processor = scene_processor(vision["patch_size"], vision["image_size"] // vision["patch_size"])
    ids = {name: config["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    target.mkdir(parents=True, exist_ok=True)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read what it writes
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    GenerationConfig(**ids, do_sample=False).save_pretrained(target)
    processor.save_pretrained(target)
    count = sum(tensor.numel() for tensor in stored.values())
    (target / "README.md").write_text(model_card(config, count, dtype, figures), encoding="utf-8")
    return target


def _read(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    for name in ("model.safetensors", "config.json"):
        if not (source / name).is_file():
            raise ValueError(f"--from: got {source}, expected a folder with {name}")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    words = config.get("text_config", {}).get("vocab_size")
    expected = len(scene_processor().tokenizer)
    if config.get("model_type") != "llava" or words != expected:
        raise ValueError(
            f"--from: got a {config.get('model_type')} of {words} words, expected a llava of the data set's {expected}"
        )
    return load_file(source / "model.safetensors"), config


def figures_of(evaluation: Path, name: str) -> dict[str, Any]:
    """What `ship` wants to know, as far as `pruneops eval` measured it of the model of a name.

    Of a dense model it is its accuracy unpruned and with PyramidDrop as published, of another that with the method that
    it was trained with.

    Raises
    ------
    ValueError
        If the file is none of an evaluation, or has nothing of the model.
    """
    try:
        document = json.loads(evaluation.read_text(encoding="utf-8"))
        entries = [Entry.from_dict(entry) for entry in document["entries"]]
        exam = Exam(*(document["settings"][key] for key in ("split", "questions", "seed")))
        trained_with = document["models"].get(name, {}).get("trained_with")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--eval: got {evaluation}, expected an eval.json of `pruneops eval`: {error}") from None
    ways = {OWN: trained_with["method"]} if trained_with else {DENSE: DENSE, PyramidDrop.name: PyramidDrop.name}
    found = {
        ways[entry.way]: entry.tally
        for entry in entries
        if entry.model == name and entry.way in ways and entry.keep is None and entry.tally.questions == exam.size
    }
    if not found:
        raise ValueError(f"--eval: {evaluation} has no results of a model {name!r}, expected one evaluated to the end")
    shares = {method: exam.shares(tally.right) for method, tally in found.items()}
    kinds = next(iter(shares.values()))
    return {
        "questions": exam.size,
        "accuracy": {method: round(tally.accuracy, 4) for method, tally in found.items()},
        "templates": {kind: {method: shares[method][kind] for method in shares} for kind in kinds},
    }


def model_card(config: Mapping[str, Any], weights: int, dtype: str, figures: Mapping[str, Any]) -> str:
    """The text of README.md."""
    pruning = config.get("pruning")
    method = method_from_dict(pruning) if pruning else None
    tuned = ""
    if method is not None:
        tuned = f"\n  It was fine-tuned with {type(method).__name__}: `{method}`."
    training = f"\n  {figures['training']}" if "training" in figures else ""
    return CARD.format(
        title="" if method is None else f", fine-tuned with {type(method).__name__}",
        millions=weights / 1e6,
        note=NOTE,
        vision_layers=config["vision_config"]["num_hidden_layers"],
        layers=config["text_config"]["num_hidden_layers"],
        width=config["text_config"]["hidden_size"],
        side=config["vision_config"]["image_size"],
        tokens=config["image_seq_length"],
        method=tuned,
        training=training,
        dtype=dtype,
        imports=STOCK_IMPORTS if method is None else METHOD_IMPORTS,
        argument="" if method is None else f'"{method.name}"',
        accuracy=_accuracy(figures),
    )


def _accuracy(figures: Mapping[str, Any]) -> str:
    """A table of shares: methods across, kinds of questions down."""
    accuracy = figures.get("accuracy")
    if not accuracy:
        return "Not measured."
    names = list(accuracy)
    shares = {**figures.get("templates", {}), "all": accuracy}
    rows = [["questions", *names], ["---"] * (1 + len(names))]
    rows += [
        [kind, *(f"{100 * of[name]:.1f} %" if name in of else "" for name in names)] for kind, of in shares.items()
    ]
    asked = f"{figures['questions']} questions" if "questions" in figures else "Questions"
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f'{asked} about pictures of the split "test", which it was not trained on, and the share of the answers that\n'
        f'are right word for word; "dense" keeps all visual tokens.\n\n{table}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR", help="the trained model")
    parser.add_argument("--to", dest="target", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float16",
        help="of the stored weights (default: %(default)s)",
    )
    parser.add_argument("--eval", type=Path, metavar="JSON", help="the eval.json with what was measured of the source")
    parser.add_argument("--training", metavar="SENTENCE", help="on how it was trained, for the model card")
    options = parser.parse_args()
    figures = figures_of(options.eval, options.source.resolve().name) if options.eval else {}
    if options.training:
        figures["training"] = options.training
    folder = ship(options.source, options.target, options.dtype, figures)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
