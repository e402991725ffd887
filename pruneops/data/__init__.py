"""Visual question answering that is rendered on the spot: pictures of small shapes and signs, and short clips.

Objects are a patch or two of a busy 24 x 24 grid, so that an answer hangs on few of the 576 visual tokens, and no
question can be answered without looking. The same seed gives the same bytes on every machine.
"""

from pruneops.data.clip import CLIP_GRID, CLIP_TEMPLATES
from pruneops.data.curriculum import CurriculumDataset
from pruneops.data.export import export
from pruneops.data.labels import IGNORED, LABELS, patch_labels
from pruneops.data.model import scene_llava_config, scene_processor
from pruneops.data.questions import TEMPLATES, Question
from pruneops.data.records import PatchDataset, SampleDataset, record
from pruneops.data.samples import KINDS, SPLITS, Sample, Samples
from pruneops.data.scene import GRID
from pruneops.data.sheet import draw_samples
from pruneops.data.tokenizer import scene_tokenizer

__all__ = [
    "CLIP_GRID",
    "CLIP_TEMPLATES",
    "GRID",
    "IGNORED",
    "KINDS",
    "LABELS",
    "SPLITS",
    "TEMPLATES",
    "CurriculumDataset",
    "PatchDataset",
    "Question",
    "Sample",
    "SampleDataset",
    "Samples",
    "draw_samples",
    "export",
    "patch_labels",
    "record",
    "scene_llava_config",
    "scene_processor",
    "scene_tokenizer",
]
