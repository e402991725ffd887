"""Answers a question about a picture with PyramidDrop: python answer_pruned.py [CHECKPOINT [PICTURE QUESTION]]"""

import sys

from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pruneops
from pruneops.data import Samples
from pruneops.methods import PyramidDrop
from pruneops.models.scene import scene_llava_folder

sample = Samples("test", 1, seed=7, turns=1)[0]  # a rendered picture, the only kind that the shipped model knows
image, question = Image.fromarray(sample.pictures[0]), sample.turns[0].text
checkpoint = sys.argv[1] if len(sys.argv) > 1 else scene_llava_folder()
if len(sys.argv) > 3:
    image, question = Image.open(sys.argv[2]), sys.argv[3]
processor = AutoProcessor.from_pretrained(checkpoint)
model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
prompt = processor.apply_chat_template([message], add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)

with pruneops.prune(model, PyramidDrop(keep_ratios=(0.5, 0.25, 0.125))) as run:
    ids = model.generate(**inputs, max_new_tokens=24)
print(question, processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(run.report())
