"""Answers a question about a picture with PyramidDrop: python answer_pruned.py [CHECKPOINT] [PICTURE]"""

import sys

from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pruneops
from pruneops.methods import PyramidDrop
from pruneops.models.small import build_small_llava
from pruneops.runner import ASSET

checkpoint = sys.argv[1] if len(sys.argv) > 1 else build_small_llava("demo/small-llava")  # untrained
image = Image.open(sys.argv[2] if len(sys.argv) > 2 else ASSET)
processor = AutoProcessor.from_pretrained(checkpoint)
model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
prompt = "USER: <image>\nWhat is in this picture? ASSISTANT:"
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)

with pruneops.prune(model, PyramidDrop(keep_ratios=(0.5, 0.25, 0.125))) as run:
    ids = model.generate(**inputs, max_new_tokens=24)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(run.report())
