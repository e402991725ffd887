"""A tokenizer whose words are those of the data set; anything else is spelled in bytes, so that no text is lost."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from pruneops.data.glyphs import SHAPES
from pruneops.data.words import COLOUR_NAMES, DIRECTIONS, MOTIONS, NUMBERS, REGIONS, SIGN_NAMES, SYLLABLES, plural
from pruneops.models.checkpoints.processor import IMAGE_TOKEN, SYSTEM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, UNKNOWN, IMAGE, VIDEO = "<s>", "</s>", "<pad>", "<unk>", IMAGE_TOKEN, "<video>"
SPECIALS = (PAD, BOS, EOS, UNKNOWN, IMAGE, VIDEO)

#: LLaVA's "v1" conversation, the same as `pruneops.training.render` makes for training; a video is one placeholder.
CHAT_TEMPLATE = (
    SYSTEM + "{{ ' ' }}{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE + "\n' }}{% elif part['type'] == 'video' %}{{ '" + VIDEO + "\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# The fixed words of all templates; a test holds this against what they produce.
_SENTENCES = (
    "What colour shape is the object Where directly written on sign How many are there Which most common among shapes "
    "Describe picture The shows There a an that says at way does move objects appear appears first last next after "
    "USER ASSISTANT"
)
#: Marks what continues a word; no byte is written like this.
_INNER = "\u2581"


@cache
def words() -> tuple[str, ...]:
    """All words, numbers and syllables of the data set and of the conversation around them, sorted."""
    names = (*COLOUR_NAMES, *SIGN_NAMES, *SHAPES, *map(plural, SHAPES), *REGIONS, *DIRECTIONS, *MOTIONS)
    text = " ".join((_SENTENCES, SYSTEM, *names))
    return tuple(sorted({*re.findall(r"[A-Za-z]+", text), *NUMBERS, *SYLLABLES}))


def scene_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the data set, with or without a space before it; a sign's word is its two syllables.

    Every other text falls back to one token a byte, and decodes to what it was. Pads on the left, as decoder-only
    batches need. The numbers of tokens depend on nothing but the words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\u0120"  # how byte-level tokenizers write a space
    known = [spaced + word for word in words() for spaced in ("", space)]
    entries = [*SPECIALS, *letters, *(_INNER + letter for letter in letters), *known]
    entries += [_INNER + syllable for syllable in SYLLABLES]
    # Words of one letter are there already.
    vocab = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    # The longest known beginning of a word is taken, then the longest of what is left.
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN, continuing_subword_prefix=_INNER))
    # Cut, a word of any length takes time in proportion to it, and none is too long to be known.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(Regex(".{1,32}"), "isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_INNER, ""), decoders.ByteLevel()])
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, VIDEO],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
