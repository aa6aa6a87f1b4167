"""Our transplants beside those of `mergekit-tokensurgeon`: `python -m …measure_mergekit`.

The released implementation (mergekit 0.1.5, LGPL-3.0) runs as a program of its own, in its own
environment, on folders that we write; only its output is read. Set up once, in the root of the
project; the second and third line lend it this environment's torch and transformers:

    python -m venv .peers/mergekit
    python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > lent.pth
    mv lent.pth .peers/mergekit/lib/python3.*/site-packages/
    .peers/mergekit/bin/pip install --no-deps mergekit==0.1.5 immutables peft

    python -m tests.methods.tokenizers.measure_mergekit            # tiny random models
    python -m tests.methods.tokenizers.measure_mergekit --real     # SmolLM2 and the project's donor
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from hardware.profile import Profile
from methods.tokenizers.common import VocabularyTransplant
from methods.tokenizers.mean_rows import MeanRows
from methods.tokenizers.omp_transplant import OmpTransplant
from methods.tokenizers.subword_mean import SubwordMean
from methods.tokenizers.zero_rows import ZeroRows
from models.base import Unsupported
from models.loading import load
from models.tokenized import CausalTokenizedLM, PlainTokenizer, Vocabulary, load_donor
from tasks.bits_per_byte import BitsPerByte
from tests.models.tokenizers_zoo import byte_level, tiny_lm

PROGRAM = Path(__file__).parents[3] / ".peers" / "mergekit" / "bin" / "mergekit-tokensurgeon"
PROFILE = Profile(name="measure", kind="cpu", label="Whatever runs this")
# What mergekit calls our methods.
THEIR_NAMES: dict[type[VocabularyTransplant], str] = {
    OmpTransplant: "omp",
    MeanRows: "mean",
    ZeroRows: "zero",
    SubwordMean: "subword",
}


class Tables(NamedTuple):
    """Input embedding and output head, (tokens, width) each; one and the same where tied."""

    input_rows: Tensor
    output_rows: Tensor


class Difference(NamedTuple):
    """How far two transplants are apart.

    Attributes:
        shared: Largest difference in rows that are copied, and are no special token's.
        special: Ids of special tokens that are copied from elsewhere.
        new: Largest difference in rows that are made, over the length of ours.
        made: Number of those rows.
    """

    shared: float
    special: tuple[int, ...]
    new: float
    made: int


def by_mergekit(
    base: Path, donor: Path, out: Path, method: VocabularyTransplant, *, program: Path = PROGRAM
) -> Tables:
    """Return the tables that mergekit makes.

    Args:
        base: Folder of the model that keeps its body.
        donor: Folder of the model whose tokenizer is taken.
        out: Where the result goes.
        method: Ours of the same idea; its `k` and `batch` are passed on.
        program: The command.

    Raises:
        subprocess.CalledProcessError: It failed; its words are in the error's `stderr`.
    """
    settings = ["--approximation-method", THEIR_NAMES[type(method)]]
    if isinstance(method, OmpTransplant):
        settings += ["--k", str(method.k), "--batch-size", str(method.batch)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(
        [str(program), str(base), str(donor), str(out), *settings],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    found: dict[str, Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                if name in ("model.embed_tokens.weight", "lm_head.weight"):
                    found[name] = weights.get_tensor(name).float()
    embedding = found["model.embed_tokens.weight"]
    return Tables(embedding, found.get("lm_head.weight", embedding))


def by_us(model: CausalTokenizedLM, method: VocabularyTransplant) -> tuple[Tables, list[int]]:
    """Return the tables that we make, and the ids of the rows that are not copied."""
    donor = load_donor(method.donor, offline=True)
    with method.apply(model, PROFILE) as changed:
        assert isinstance(changed.input_rows, Tensor)  # type: ignore[attr-defined]  # a wrapper
        tables = Tables(changed.input_rows.float(), changed.output_rows.float())  # type: ignore[attr-defined]
    known = {key for key in model.vocabulary.keys if key is not None}
    roles = {
        donor.vocabulary.roles[role]
        for role in donor.vocabulary.roles
        if role in model.vocabulary.roles
    }
    new = [
        number
        for number, key in enumerate(donor.vocabulary.keys)
        if key is not None and key not in known and number not in roles
    ]
    return tables, new


def difference(ours: Tensor, theirs: Tensor, new: list[int], donor: Vocabulary) -> Difference:
    """Compare one table of both, which may end in rows that no token has.

    Which special token of the base plays a part of the donor's is a matter of opinion: SmolLM2's
    texts begin with `<|endoftext|>` in pre-training, which we go by, and its configuration calls
    `<|im_start|>` the beginning, which mergekit goes by.
    """
    rows = min(len(ours), len(theirs))
    apart = (ours[:rows] - theirs[:rows]).norm(dim=1)
    is_new = torch.zeros(rows, dtype=torch.bool)
    is_new[new] = True
    is_special = torch.tensor([key is not None and key.kind == "special" for key in donor.keys])
    is_special = torch.cat([is_special, torch.zeros(rows, dtype=torch.bool)])[:rows]
    elsewhere = (is_special & ~is_new & (apart > 0)).nonzero()[:, 0].tolist()
    lengths = ours[:rows].norm(dim=1)[is_new].clamp(min=1e-6)
    relative = (apart[is_new] / lengths).max() if new else torch.zeros(())
    shared = apart[~is_new & ~is_special].max()
    return Difference(float(shared), tuple(elsewhere), float(relative), len(new))


def tiny_folders(parent: Path, *, base_tied: bool, donor_tied: bool) -> tuple[Any, Path, Path]:
    """Write a random base and a random donor with GPT-2's kind of tokenizer; return the base."""
    base = tiny_lm(tied=base_tied)
    donor = tiny_lm(hub=byte_level(340, True), tied=donor_tied, seed=1)
    folders = []
    for name, model in (("base", base), ("donor", donor)):
        folder = parent / name
        model.module.save_pretrained(folder)
        model.tokenizer.hub.save_pretrained(folder)  # type: ignore[attr-defined]  # a hub's
        folders.append(folder)
    return base, folders[0], folders[1]


def donor_as_model(folder: Path, donor_id: str) -> Path:
    """Write a donor of the project as a model, which mergekit wants; its layers are never read."""
    donor = load_donor(donor_id, offline=True)
    assert isinstance(donor.tokenizer, PlainTokenizer)
    tokens, width = donor.input_rows.shape
    config = transformers.LlamaConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    module = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        module.get_input_embeddings().weight.copy_(donor.input_rows)
    module.save_pretrained(folder)
    donor.tokenizer.hub.save_pretrained(folder)
    return folder


def measure_tiny() -> None:
    """Print how far the rows are apart, for tied and untied models."""
    for base_tied, donor_tied in ((True, True), (True, False), (False, False), (False, True)):
        for method_class, settings in (
            (OmpTransplant, {"k": 1}), (OmpTransplant, {"k": 8}), (OmpTransplant, {"k": 32}),
            (ZeroRows, {}), (MeanRows, {}), (SubwordMean, {}),
        ):  # fmt: skip
            with tempfile.TemporaryDirectory() as parent:
                place = Path(parent)
                base, base_folder, donor_folder = tiny_folders(
                    place, base_tied=base_tied, donor_tied=donor_tied
                )
                method = method_class(donor=f"path:{donor_folder}", **settings)
                ours, new = by_us(base, method)
                theirs = by_mergekit(base_folder, donor_folder, place / "out", method)
                kinds = ", ".join(
                    f"{side} {'tied' if tied else 'untied'}"
                    for side, tied in (("base", base_tied), ("donor", donor_tied))
                )
                vocabulary = load_donor(method.donor, offline=True).vocabulary
                for name, mine, other in zip(Tables._fields, ours, theirs, strict=True):
                    found = difference(mine, other, new, vocabulary)
                    print(
                        f"{kinds}, {method_class.__name__} {settings}, {name}: {found.made} rows "
                        f"made, {found.new:.1e} apart; copied rows {found.shared:.1e} apart",
                        flush=True,
                    )


def measure_real(k: int, passages: int) -> None:
    """Print time, rows and bits per byte of both on SmolLM2 behind the project's donor."""
    model = load("smollm2-135m", offline=True, capability="TokenizedLM")
    assert isinstance(model, CausalTokenizedLM)
    items = list(BitsPerByte(passages=passages).items())
    with tempfile.TemporaryDirectory() as parent:
        place = Path(parent)
        base_folder = place / "base"
        model.module.save_pretrained(base_folder)
        assert isinstance(model.tokenizer, PlainTokenizer)
        model.tokenizer.hub.save_pretrained(base_folder)
        donor_folder = donor_as_model(place / "donor", "python-bpe")
        method = OmpTransplant(donor=f"path:{donor_folder}", k=k)
        began = time.perf_counter()
        ours, new = by_us(model, method)
        middle = time.perf_counter()
        theirs = by_mergekit(base_folder, donor_folder, place / "out", method)
        print(f"ours {middle - began:.1f} s, mergekit {time.perf_counter() - middle:.1f} s")
        donor = load_donor(method.donor, offline=True)
        found = difference(ours.input_rows, theirs.input_rows, new, donor.vocabulary)
        print(found)
        mixed = theirs.input_rows.clone()
        mixed[list(found.special)] = ours.input_rows[list(found.special)]
        for name, rows in (
            ("ours", ours.input_rows),
            ("mergekit", theirs.input_rows),
            ("mergekit with our special tokens", mixed),
        ):
            made = model.with_vocabulary(donor.tokenizer, donor.vocabulary, rows)
            bits = np.array([made.score(item.fields["text"]).bits_per_byte for item in items])
            print(f"{name:32} {bits.mean():.4f} bits/byte over {len(items)} passages")


def main() -> None:
    """Compare on the command line's models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="SmolLM2, a minute or two")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--passages", type=int, default=8)
    chosen = parser.parse_args()
    if not PROGRAM.is_file():
        raise Unsupported(f"mergekit is not at {PROGRAM}; see `--help` for how to put it there.")
    if chosen.real:
        measure_real(chosen.k, chosen.passages)
    else:
        measure_tiny()


if __name__ == "__main__":
    main()
