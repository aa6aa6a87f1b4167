"""Make the donors: `python -m models.embedded.donors.train --out models/embedded/donors`.

A donor is a tokenizer with an embedding and no language model. Both are made of the sources of
Python's standard library and of generated sums:

1. A byte-level BPE. Texts are split before merging as by Llama 3 and Qwen 2, not as by GPT-2: a
   mark of punctuation may begin a token (`(self`, `_name`), and numbers stand alone, digit by
   digit (`python-bpe`, as Qwen's and SmolLM2's) or up to three together (`python-bpe-grouped`, as
   Llama 3's).
2. Static vectors: positive pointwise mutual information of tokens at most four apart (contexts
   smoothed by the power 0.75), reduced by a truncated SVD, rows U sqrt(S). Source: Levy, Goldberg
   and Dagan, TACL 2015.

The library's documentation proper (`pydoc_data`) and its tests are left out: they are what
transplants are evaluated on.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from safetensors.torch import save_file
from sklearn.utils.extmath import randomized_svd
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, WIDTH = 8192, 128
REACH, SMOOTHING = 4, 0.75
SUMS, SUMS_IN_A_TEXT = 40_000, 20
START = "<|endoftext|>"
LEFT_OUT = ("test", "tests", "idle_test", "pydoc_data", "site-packages", "lib2to3", "encodings")
# What is kept together before merging, as Llama 3 has it; `{digits}` is 1 for Qwen 2.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"python_bpe": 1, "python_bpe_grouped": 3}


def library_texts() -> Iterator[str]:
    """Yield the sources of the standard library's modules, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not set(path.relative_to(root).parts).intersection(LEFT_OUT):
            yield path.read_text(encoding="utf-8", errors="ignore")


def sum_texts(seed: int = 0) -> Iterator[str]:
    """Yield texts of lines such as `12 + 345 = 357`, terms of one to three digits."""
    draw = random.Random(seed)
    for _ in range(SUMS // SUMS_IN_A_TEXT):
        terms = [
            [draw.randrange(10 ** draw.randint(1, 3)) for _ in range(2)]
            for _ in range(SUMS_IN_A_TEXT)
        ]
        yield "".join(f"{first} + {second} = {first + second}\n" for first, second in terms)


def train_tokenizer(texts: Sequence[str], digits: int) -> Tokenizer:
    """Return a byte-level BPE over texts whose numbers are tokens of at most `digits` digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT.format(digits=digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def counts_of(token_ids: npt.NDArray[np.int64], size: int) -> scipy.sparse.csr_array:
    """Return how often tokens stand at most `REACH` apart, (size, size), symmetric."""
    total = scipy.sparse.csr_array((size, size), dtype=np.float64)
    for distance in range(1, REACH + 1):
        left, right = token_ids[:-distance], token_ids[distance:]
        ones = np.ones(len(left))
        total = total + scipy.sparse.coo_array((ones, (left, right)), shape=(size, size)).tocsr()
    return (total + total.T).tocsr()


def vectors_of(counts: scipy.sparse.csr_array, width: int) -> npt.NDArray[np.float32]:
    """Return a vector for each token, (tokens, width); zeros for tokens that never occur."""
    rows = np.asarray(counts.sum(axis=1)).ravel()
    contexts = rows**SMOOTHING
    contexts /= contexts.sum()
    pairs = counts.tocoo()
    first, second = pairs.coords
    expected = rows[first] * contexts[second]
    information = np.log(pairs.data / expected).clip(min=0)
    positive = scipy.sparse.csr_array((information, (first, second)), shape=counts.shape)
    left, values, _ = randomized_svd(
        scipy.sparse.csr_matrix(positive), n_components=width, n_iter=6, random_state=0
    )
    vectors: npt.NDArray[np.float32] = (left * np.sqrt(values)).astype(np.float32)
    return vectors


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both donors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for a folder of each donor")
    out: Path = parser.parse_args(arguments).out
    texts = [*library_texts(), *sum_texts()]
    for name, digits in DIGITS.items():
        tokenizer = train_tokenizer(texts, digits)
        start = tokenizer.token_to_id(START)
        ids = [token for each in tokenizer.encode_batch(texts) for token in (start, *each.ids)]
        vectors = vectors_of(counts_of(np.array(ids), tokenizer.get_vocab_size()), WIDTH)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        half = torch.from_numpy(vectors).half()
        save_file({"token_embedding.weight": half}, folder / "model.safetensors")
        special = {"bos_token": START, "eos_token": START}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        made = {
            "python": platform.python_version(),
            "characters": sum(map(len, texts)),
            "tokens": len(ids),
            "tokens_without_vector": int((np.abs(vectors).sum(axis=1) == 0).sum()),
        }
        (folder / "made.json").write_text(json.dumps(made, indent=2) + "\n")
        print(name, made)


if __name__ == "__main__":
    main()
