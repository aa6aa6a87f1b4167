"""Our rows are those of the released implementation, where that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from methods.tokenizers.mean_rows import MeanRows
from methods.tokenizers.omp_transplant import OmpTransplant
from methods.tokenizers.subword_mean import SubwordMean
from models.tokenized import TokenKey, Vocabulary, load_donor
from tests.methods.tokenizers.measure_mergekit import (
    PROGRAM,
    by_mergekit,
    by_us,
    difference,
    tiny_folders,
)

needs_mergekit = pytest.mark.skipif(
    not PROGRAM.is_file(), reason="mergekit is not in .peers; see measure_mergekit"
)


@needs_mergekit
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method_class", "settings"),
    [(OmpTransplant, {"k": 1}), (OmpTransplant, {"k": 24}), (MeanRows, {}), (SubwordMean, {})],
)
def test_the_released_program_makes_the_same_rows(
    method_class: type, settings: dict[str, int], tied: bool, tmp_path: Path
) -> None:
    base, base_folder, donor_folder = tiny_folders(tmp_path, base_tied=tied, donor_tied=tied)
    method = method_class(donor=f"path:{donor_folder}", **settings)
    ours, new = by_us(base, method)
    theirs = by_mergekit(base_folder, donor_folder, tmp_path / "out", method)
    vocabulary = load_donor(method.donor).vocabulary
    for mine, other in zip(ours, theirs, strict=True):
        found = difference(mine, other, new, vocabulary)
        assert found.made > 50
        assert (found.shared, found.special) == (0, ())
        assert found.new < 1e-5
    assert torch.equal(theirs.input_rows, theirs.output_rows) == tied


def test_a_difference_is_told_apart_by_what_kind_of_row_it_is_in() -> None:
    keys = (TokenKey("special", b"<s>"), TokenKey("word", b"a"), TokenKey("word", b"b"))
    donor = Vocabulary(keys, {"start": 0})
    ours = torch.tensor([[1.0, 0], [2.0, 0], [0, 4.0], [9.0, 9]])
    assert difference(ours, ours, [2], donor) == (0, (), 0, 1)
    theirs = ours + torch.tensor([[1.0, 0], [0, 0.5], [0, 1], [0, 0]])
    assert difference(ours, theirs[:3], [2], donor) == (0.5, (0,), 0.25, 1)
