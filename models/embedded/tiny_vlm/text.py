"""The words of tiny-vlm, its prompts, and its tokenizer.

One token per word; numbers and words that are not in the list are spelled, as in WordPiece: the
first character as it is, the following ones with "##" before them. `encode` is a plain Python
version for making training data; a test holds it equal to the tokenizer that ships.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

from models.embedded.scenes.generator import COLOUR_NAMES, PATTERNS, SHAPES, SIZES
from models.embedded.scenes.questions import LETTERS, Question

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIALS))
_PUNCTUATION = (".", ",", ":", ";", "?", "!", "'", "(", ")", "-", "/")
_DIGITS = tuple("0123456789")
_SMALL = tuple("abcdefghijklmnopqrstuvwxyz")
_CAPITALS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# What the questions and captions need, then the wordings of other harnesses and tasks to come.
_WORD_LIST = """
USER ASSISTANT Answer with the option s letter from given choices directly What colour is shape
How many objects are there Where relative to In which part of image top bottom left right above
below Which number word written does background look like object largest on at Describe phrase
Hint Question Options Please select correct answer option There several and only using single or
Is it this that an one two three four five six smallest biggest nearest between inside outside
near next both no yes true false not same different more less than all any find Find detect
Detect point Point boxes box output Output bounding coordinates format None none Count count
picture scene shown see show can you do has have how what where who color colors colours shapes
sizes size width height first second last row column middle center centre corner edge person car
road sky tree button icon field text menu tab list page open close click press head hand arm leg
foot joint knee elbow frame video moving moved before after time start end up down forward back
turn stop go fast slow
"""
VOCABULARY = tuple(
    dict.fromkeys(
        (
            *SPECIALS,
            *_PUNCTUATION,
            *_DIGITS,
            *(f"##{digit}" for digit in _DIGITS),
            *_SMALL,
            *(f"##{letter}" for letter in _SMALL),
            *_CAPITALS,
            *COLOUR_NAMES,
            *SHAPES,
            *SIZES,
            *PATTERNS,
            *_WORD_LIST.split(),
        )
    )
)
_IDS = {word: number for number, word in enumerate(VOCABULARY)}
_PIECES = re.compile(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]")

OPTION_CLOSING = "Answer with the option's letter from the given choices directly."
DIRECT_CLOSING = "Answer with a word or phrase."
CAPTION_REQUEST = "Describe the image."


@lru_cache(maxsize=65536)
def encode(text: str) -> tuple[int, ...]:
    """Return the ids of a text without special tokens."""
    found: list[int] = []
    for piece in _PIECES.findall(text):
        number = _IDS.get(piece)
        found += (number,) if number is not None else _spell(piece)
    return tuple(found)


def _spell(piece: str) -> list[int]:
    """Split an unknown word greedily, longest piece first, as WordPiece does."""
    found, start = [], 0
    while start < len(piece):
        prefix = "##" if start else ""
        for end in range(len(piece), start, -1):
            number = _IDS.get(prefix + piece[start:end])
            if number is not None:
                found.append(number)
                start = end
                break
        else:
            return [UNK]
    return found


def option_prompt(question: Question) -> str:
    """Return the text after the image for an answer by letter, LLaVA's wording."""
    lines = [
        f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True)
    ]
    return "\n".join([question.text, *lines, OPTION_CLOSING]) + " ASSISTANT:"


def direct_prompt(question: Question) -> str:
    """Return the text after the image for an answer in words."""
    return f"{question.text}\n{DIRECT_CLOSING} ASSISTANT:"


def caption_prompt() -> str:
    """Return the text after the image for a caption."""
    return f"{CAPTION_REQUEST} ASSISTANT:"


# The text in front of the image; with "<image>" after it, a whole prompt of LLaVA's form.
BEFORE_IMAGE = "USER: "


def write_tokenizer(folder: Path, added: tuple[str, ...] = ()) -> None:
    """Write tokenizer.json and what transformers' AutoProcessor needs beside it.

    Args:
        folder: Where to.
        added: Tokens beyond the vocabulary, recognised as they are written wherever they stand.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(dict(_IDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": 2048,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": 96, "width": 96},
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 8,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
