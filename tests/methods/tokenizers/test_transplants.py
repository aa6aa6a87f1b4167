"""Transplants: what is shared is copied, what is new is made as said, the model is left alone."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hardware.profile import Profile
from methods.tokenizers.common import (
    Space,
    VocabularyTransplant,
    align,
    byte_matches,
    find_donor,
    key_text,
    permuted,
    prefix_matches,
    without,
)
from methods.tokenizers.common_pursuit import orthogonal_matching_pursuit
from methods.tokenizers.focus_like import FocusLike
from methods.tokenizers.mean_rows import MeanRows
from methods.tokenizers.native_tokenizer import NativeTokenizer
from methods.tokenizers.omp_transplant import OmpTransplant, well_trained
from methods.tokenizers.random_rows import RandomRows
from methods.tokenizers.subword_mean import Speller, SubwordMean
from methods.tokenizers.wechsel_like import WechselLike
from methods.tokenizers.zero_rows import ZeroRows
from models.base import Decoding, Unsupported
from models.tokenized import CausalTokenizedLM, TokenKey, Vocabulary, donor_of, vocabulary_of
from tests.models.tokenizers_zoo import byte_level, sentence_piece, tiny_lm, word_piece

PROFILE = Profile(name="test", kind="cpu", label="Test")
TEXT = "the cat sat where the river ran, and no other theatre was there"
RIVALS = (ZeroRows, MeanRows, RandomRows, SubwordMean, FocusLike, WechselLike)
ALL: tuple[type[VocabularyTransplant], ...] = (OmpTransplant, *RIVALS)


def small(cls: type[VocabularyTransplant], **settings: Any) -> VocabularyTransplant:
    """A method that fits tiny tables."""
    return cls(**({"k": 6} if cls is OmpTransplant else {}), **settings)


@pytest.fixture(scope="session")
def donor_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Donors of three kinds with random tables; `headed` has an output head of its own."""
    ids = {}
    hubs = {
        "pieces": word_piece(), "other": byte_level(320, True),
        "sentence": sentence_piece(), "headed": byte_level(320, True),
    }  # fmt: skip
    for seed, (name, hub) in enumerate(hubs.items()):
        folder = tmp_path_factory.mktemp(name)
        hub.save_pretrained(folder)
        (folder / "config.json").write_text("{}")
        generator = torch.Generator().manual_seed(seed)
        tables = {"embed_tokens.weight": torch.randn(len(hub) + 3, 32, generator=generator)}
        if name == "headed":
            tables["lm_head.weight"] = torch.randn(len(hub) + 3, 24, generator=generator)
        save_file(tables, folder / "model.safetensors")
        ids[name] = f"path:{folder}"
    return ids


def space_of(model: CausalTokenizedLM, donor_id: str) -> Space:
    donor = find_donor(donor_id, model)
    alignment = align(model.vocabulary, donor.vocabulary)
    return Space(
        donor.input_rows,
        model.input_rows.float(),
        alignment.shared_donor,
        alignment.shared_base,
        donor.vocabulary,
        model.vocabulary,
        model.tokenizer,
    )


def transplanted(method: VocabularyTransplant, model: CausalTokenizedLM) -> Any:
    with method.apply(model, PROFILE) as changed:
        return changed


def vocabulary(*keys: TokenKey | None, **roles: int) -> Vocabulary:
    return Vocabulary(tuple(keys), roles)


# --- matching -------------------------------------------------------------------------------------


def test_tokens_match_by_what_they_say_and_special_ones_by_their_part() -> None:
    base = vocabulary(
        TokenKey("special", b"<s>"),
        TokenKey("word", b"the"),
        TokenKey("inner", b"the"),
        TokenKey("special", b"<tool>"),
        TokenKey("word", b"the"),
        start=0,
    )
    donor = vocabulary(
        TokenKey("inner", b"the"),
        TokenKey("special", b"[CLS]"),
        None,
        TokenKey("word", b"the"),
        TokenKey("special", b"<tool>"),
        TokenKey("special", b"[MASK]"),
        TokenKey("word", b"The"),
        start=1,
        mask=5,
    )
    found = align(base, donor)
    assert found.shared_donor.tolist() == [0, 1, 3, 4]
    assert found.shared_base.tolist() == [2, 0, 1, 3]  # of two equal keys the first counts
    assert found.new.tolist() == [5, 6]
    assert found.size == 7


def test_a_token_of_several_parts_takes_the_first() -> None:
    base = vocabulary(TokenKey("special", b"a"), TokenKey("special", b"b"), start=0, end=1)
    donor = vocabulary(TokenKey("special", b"x"), start=0, end=0)
    assert align(base, donor).shared_base.tolist() == [0]


def test_real_kinds_of_tokenizers_share_their_words() -> None:
    byte, piece, sentence = map(vocabulary_of, (byte_level(), word_piece(), sentence_piece()))
    for one, other in ((byte, piece), (byte, sentence), (piece, sentence)):
        found = align(one, other)
        pairs = zip(found.shared_base.tolist(), found.shared_donor.tolist(), strict=True)
        for mine, theirs in pairs:
            mine_key, their_key = one.keys[mine], other.keys[theirs]
            assert mine_key is not None
            assert their_key is not None
            assert mine_key == their_key or mine_key.kind == their_key.kind == "special"
        shared = {other.keys[token] for token in found.shared_donor.tolist()}
        assert TokenKey("word", b"the") in shared
        assert len(found.new) + len(found.shared_donor) == sum(k is not None for k in other.keys)


def test_the_longest_proper_prefix_is_taken_and_no_other_kind() -> None:
    base = vocabulary(
        TokenKey("word", b"t"), TokenKey("word", b"the"), TokenKey("inner", b"theat"),
        TokenKey("word", b"theatre"),
    )  # fmt: skip
    donor = vocabulary(
        TokenKey("word", b"theatre"), TokenKey("inner", b"the"), TokenKey("word", b"tea"),
        TokenKey("special", b"the"),
    )  # fmt: skip
    assert prefix_matches(base, donor, range(4)) == {0: 1, 2: 0}


def test_a_byte_and_its_character_match_in_both_directions() -> None:
    base = vocabulary(TokenKey("byte", b"A"), TokenKey("inner", b"B"), TokenKey("word", b"C"))
    donor = vocabulary(
        TokenKey("inner", b"A"), TokenKey("byte", b"B"), TokenKey("byte", b"C"),
        TokenKey("inner", b"AB"),
    )  # fmt: skip
    assert byte_matches(base, donor, range(4)) == {0: 0, 1: 1}


def test_rows_that_are_little_like_the_unused_ones_are_harmless() -> None:
    # Cosines to the unused row up to 0.4: a few are above the 99% quantile, none above a half.
    cosines = torch.linspace(0, 0.4, 300)
    rows = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    rows = torch.cat([rows, torch.tensor([[1.0, 0.0]])])
    keys = tuple(TokenKey("word", str(number).encode()) for number in range(300))
    assert (cosines > torch.quantile(torch.cat([cosines, torch.ones(1)]), 0.99)).any()
    good = well_trained(rows, vocabulary(*keys, TokenKey("special", b"[unused1]")))
    assert good[280:300].all()


# --- the same tokenizer again ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("tied", [True, False])
def test_the_models_own_tokenizer_as_donor_changes_no_bit(
    cls: type[VocabularyTransplant], tied: bool
) -> None:
    model = tiny_lm(tied=tied)
    changed = transplanted(small(cls, donor="same"), model)
    assert torch.equal(changed.input_rows, model.input_rows)
    assert torch.equal(changed.output_rows, model.output_rows)
    assert changed.is_tied == tied
    assert changed.score(TEXT).bits == model.score(TEXT).bits
    decoding = Decoding(max_new_tokens=12)
    assert changed.generate(TEXT, decoding).token_ids == model.generate(TEXT, decoding).token_ids


@pytest.mark.parametrize("cls", ALL)
def test_other_ids_and_a_rotated_embedding_change_no_probability(
    cls: type[VocabularyTransplant],
) -> None:
    model = tiny_lm()
    changed = transplanted(small(cls, donor="permuted"), model)
    plain, found = model.score(TEXT), changed.score(TEXT)
    assert found.token_ids != plain.token_ids
    assert found.decoded == TEXT
    assert found.bits == pytest.approx(plain.bits, abs=1e-4)
    decoding = Decoding(max_new_tokens=12)
    assert changed.generate(TEXT, decoding).text == model.generate(TEXT, decoding).text
    assert changed.facts.eos_ids == {changed.vocabulary.roles["end"]}


def test_hidden_tokens_get_the_same_rows_whichever_way_the_donor_is_turned() -> None:
    model = tiny_lm("llama")
    own, turned = donor_of(model), permuted(donor_of(model), seed=3)
    old_id = {key: number for number, key in enumerate(own.vocabulary.keys)}
    hidden = torch.arange(5, len(own.vocabulary), 10)
    here = torch.tensor([old_id[key] for key in turned.vocabulary.keys])
    # The same vectors among one another, in another basis.
    assert not torch.allclose(turned.input_rows, own.input_rows[here], atol=0.1)
    torch.testing.assert_close(
        turned.input_rows @ turned.input_rows.T,
        own.input_rows[here] @ own.input_rows[here].T,
        rtol=1e-4,
        atol=1e-4,
    )
    rows = []
    for donor in (own, turned):
        back = torch.tensor([old_id[key] for key in donor.vocabulary.keys])
        is_hidden = torch.isin(back, hidden)
        shared_donor = (~is_hidden).nonzero()[:, 0]
        space = Space(
            donor.input_rows,
            own.input_rows,
            shared_donor,
            back[shared_donor],
            donor.vocabulary,
            own.vocabulary,
            model.tokenizer,
        )
        ids = is_hidden.nonzero()[:, 0]
        made = OmpTransplant(k=8).new_rows(space, ids)
        rows.append(made[back[ids].argsort()])
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-3)
    # In its own space a token's new row is the pursuit's approximation of its true row.
    kept = torch.tensor(sorted(set(range(len(own.vocabulary))) - set(hidden.tolist())))
    found = orthogonal_matching_pursuit(own.input_rows[kept], own.input_rows[hidden], 8)
    torch.testing.assert_close(rows[0], found.combine(own.input_rows[kept]), atol=1e-5, rtol=0)
    error = (rows[0] - own.input_rows[hidden]).norm(dim=1)
    torch.testing.assert_close(error, found.residual_norms[:, -1], atol=1e-4, rtol=1e-3)


def test_rows_that_no_token_has_stay_when_the_tokens_are_the_models_own() -> None:
    model = tiny_lm(spare_rows=7)
    changed = transplanted(small(OmpTransplant, donor="same"), model)
    assert torch.equal(changed.input_rows, model.input_rows)
    assert changed.score(TEXT).bits == model.score(TEXT).bits


# --- another tokenizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pieces", "other", "sentence"])
@pytest.mark.parametrize("cls", ALL)
def test_shared_rows_are_copied_and_new_ones_made_by_the_method(
    cls: type[VocabularyTransplant], kind: str, donor_folders: dict[str, str]
) -> None:
    model = tiny_lm(spare_rows=7)
    method = small(cls, donor=donor_folders[kind])
    changed = transplanted(method, model)
    space = space_of(model, donor_folders[kind])
    rows = changed.input_rows
    assert len(rows) == len(space.donor_vocabulary) == changed.facts.vocab_size
    assert torch.equal(rows[space.shared_donor], model.input_rows[space.shared_base])
    new = align(model.vocabulary, space.donor_vocabulary).new
    assert len(new)
    torch.testing.assert_close(rows[new], method.new_rows(space, new))
    assert changed.output_rows.data_ptr() == rows.data_ptr()
    scored = changed.score(TEXT)
    assert max(scored.token_ids) < len(rows)
    assert scored.trace.notes["new_tokens"] == len(new)


def test_words_of_an_uncased_word_piece_donor_survive_the_round_trip(
    donor_folders: dict[str, str],
) -> None:
    changed = transplanted(small(OmpTransplant, donor=donor_folders["pieces"]), tiny_lm())
    text = "the cat sat on the mat , and the dog was hot !"
    assert changed.score(text).decoded == text
    assert changed.generate(text, Decoding(max_new_tokens=4)).token_ids


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral-sliding-window"])
@pytest.mark.parametrize("kind", ["other", "headed"])
def test_an_untied_head_is_made_in_the_donors_own_head(
    architecture: str, kind: str, donor_folders: dict[str, str]
) -> None:
    model = tiny_lm(architecture, tied=False)
    method = OmpTransplant(k=5, donor=donor_folders[kind])
    changed = transplanted(method, model)
    space, donor = space_of(model, donor_folders[kind]), find_donor(donor_folders[kind], model)
    head = donor.input_rows if kind == "other" else donor.output_rows
    assert head is not None
    new = align(model.vocabulary, donor.vocabulary).new
    inner = space._replace(base=model.output_rows.float(), donor=head)
    torch.testing.assert_close(changed.output_rows[new], method.new_rows(inner, new))
    torch.testing.assert_close(changed.input_rows[new], method.new_rows(space, new))
    assert torch.equal(
        changed.output_rows[space.shared_donor], model.output_rows[space.shared_base]
    )


def test_a_new_row_is_the_combination_that_least_squares_finds(
    donor_folders: dict[str, str],
) -> None:
    model = tiny_lm()
    space = space_of(model, donor_folders["other"])
    new = align(model.vocabulary, space.donor_vocabulary).new[:5]
    made = OmpTransplant(k=4, batch=2).new_rows(space, new).numpy()
    atoms = space.donor[space.shared_donor].double().numpy()
    base = space.base[space.shared_base].double().numpy()
    for row, token in zip(made, new.tolist(), strict=True):
        target = space.donor[token].double().numpy()
        taken: list[int] = []
        residual, weights = target, np.zeros(0)
        for _ in range(4):
            scores = np.abs(atoms @ residual)
            scores[taken] = -1
            taken.append(int(scores.argmax()))
            weights = np.linalg.lstsq(atoms[taken].T, target, rcond=None)[0]
            residual = target - weights @ atoms[taken]
        np.testing.assert_allclose(row, weights @ base[taken], atol=1e-4)


def test_more_atoms_than_the_donors_width_are_declined(donor_folders: dict[str, str]) -> None:
    method = OmpTransplant(k=33, donor=donor_folders["pieces"])
    with pytest.raises(Unsupported, match="at most 32"), method.apply(tiny_lm(), PROFILE):
        pass


def test_prefix_and_byte_matches_take_rows_over_in_the_tables_that_are_named(
    donor_folders: dict[str, str],
) -> None:
    donor = donor_folders["other"]
    model = tiny_lm(tied=False)
    plain = transplanted(OmpTransplant(k=5, donor=donor), model)
    space = space_of(model, donor)
    new = align(model.vocabulary, space.donor_vocabulary).new.tolist()
    matches = prefix_matches(model.vocabulary, space.donor_vocabulary, new)
    tokens, sources = list(matches), list(matches.values())
    assert tokens
    for setting in ("embed", "lm_head", "yes"):
        changed = transplanted(OmpTransplant(k=5, donor=donor, prefix_match=setting), model)
        for table, rows, unmatched, own in (
            ("embed", changed.input_rows, plain.input_rows, model.input_rows),
            ("lm_head", changed.output_rows, plain.output_rows, model.output_rows),
        ):
            expected = own[sources] if setting in ("yes", table) else unmatched[tokens]
            torch.testing.assert_close(rows[tokens], expected)
    tied = tiny_lm()
    with pytest.raises(Unsupported, match="the model's are one"):
        transplanted(OmpTransplant(k=5, donor=donor, prefix_match="embed"), tied)
    sentence = donor_folders["sentence"]
    changed = transplanted(OmpTransplant(k=5, donor=sentence, byte_match="yes"), tied)
    (letter,) = tied.tokenizer.encode("Q")
    byte = changed.vocabulary.keys.index(TokenKey("byte", b"Q"))
    assert torch.equal(changed.input_rows[byte], tied.input_rows[letter])


# --- badly trained tokens -------------------------------------------------------------------------


def test_short_rows_and_those_like_unused_ones_look_badly_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 16, generator=generator)
    rows[7] *= 0.01
    rows[390:] = torch.ones(16) * 3 + 0.05 * torch.randn(10, 16, generator=generator)
    rows[11] = torch.ones(16) * 5  # a token like the unused ones
    keys = tuple(TokenKey("word", str(number).encode()) for number in range(390))
    good = well_trained(rows, Vocabulary(keys, {}))
    assert not good[7]
    # The 99% quantile of the cosines lets a few of the alike through; the worst are out.
    assert not good[[11, *range(390, 400)]].all()
    assert good.float().mean() > 0.95
    unlike = well_trained(rows[:390], Vocabulary(keys, {}))
    assert unlike[11]
    assert not unlike[7]


def test_the_filter_takes_bad_tokens_out_of_the_dictionary_and_clears_those_bad_in_both(
    donor_folders: dict[str, str],
) -> None:
    model = tiny_lm()
    space = space_of(model, donor_folders["other"])
    both, one = space.shared_donor[[20, 30]].tolist()
    donor, base = space.donor.clone(), space.base.clone()
    donor[[both, one]] *= 1e-3
    base[space.shared_base[20]] *= 1e-3
    spoiled = space._replace(donor=donor, base=base)
    method = OmpTransplant(k=3, donor=donor_folders["other"], magikarp=True)
    cleared = method.cleared(spoiled).tolist()
    assert both in cleared
    assert one not in cleared
    # The spoiled tokens as targets: they cannot be written with themselves.
    donor[both] *= 1e6
    rows = method.new_rows(spoiled._replace(donor=donor), torch.tensor([both]))
    plain = OmpTransplant(k=3).new_rows(spoiled._replace(donor=donor), torch.tensor([both]))
    assert not torch.allclose(rows, plain)
    assert OmpTransplant(k=3).cleared(spoiled).tolist() == []


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_look_badly_trained_in_both_have_rows_of_zeros_behind_the_transplant(
    tied: bool, donor_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lm(tied=tied)
    donor = find_donor(donor_folders["other"], model)
    alignment = align(model.vocabulary, donor.vocabulary)
    mine, theirs = (int(each[7]) for each in (alignment.shared_base, alignment.shared_donor))
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for table in {module.get_input_embeddings().weight, module.get_output_embeddings().weight}:
            table[mine] = 1e-6
    base = CausalTokenizedLM(module, model.tokenizer, "spoiled", model.vocabulary)
    rows = donor.input_rows.clone()
    rows[theirs] = 1e-6
    spoiled = donor._replace(input_rows=rows)
    monkeypatch.setattr("methods.tokenizers.common.find_donor", lambda name, model: spoiled)
    changed = transplanted(OmpTransplant(k=3, donor="spoiled", magikarp=True), base)
    plain = transplanted(OmpTransplant(k=3, donor="spoiled"), base)
    for found in (changed.input_rows, changed.output_rows):
        assert not found[theirs].any()
    assert torch.equal(plain.input_rows[theirs], base.input_rows[mine])
    kept = alignment.shared_donor[20:40]
    assert torch.equal(changed.input_rows[kept], plain.input_rows[kept])


def test_scores_and_texts_note_which_donor_they_are_of(donor_folders: dict[str, str]) -> None:
    model = tiny_lm()
    digests = {}
    for name in ("other", "sentence"):
        changed = transplanted(OmpTransplant(k=3, donor=donor_folders[name]), model)
        donor = find_donor(donor_folders[name], model)
        alignment = align(model.vocabulary, donor.vocabulary)
        content = donor.input_rows.numpy().tobytes()
        expected = {
            "donor_tokens": len(donor.vocabulary),
            "shared_tokens": len(alignment.shared_donor),
            "new_tokens": len(alignment.new),
            "donor_digest": hashlib.sha256(content).hexdigest()[:16],
        }
        scored = changed.score(TEXT).trace.notes
        written = changed.generate(TEXT, Decoding(max_new_tokens=2)).trace.notes
        for notes in (scored, written):
            assert {key: notes[key] for key in expected} == expected
        digests[name] = expected["donor_digest"]
    assert digests["other"] != digests["sentence"]


# --- rows for the text at hand --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_rows_for_a_text_are_those_of_all_rows_and_other_new_tokens_cannot_come(
    tied: bool, donor_folders: dict[str, str]
) -> None:
    model, donor = tiny_lm(tied=tied), donor_folders["other"]
    full = transplanted(OmpTransplant(k=5, donor=donor), model)
    part = transplanted(OmpTransplant(k=5, donor=donor, rows="text"), model)
    with pytest.raises(Unsupported, match="no row to write"):
        part.generate(TEXT, Decoding(max_new_tokens=2))
    found = part.score(TEXT)
    used = torch.tensor(sorted(set(found.token_ids)))
    torch.testing.assert_close(part.input_rows[used], full.input_rows[used])
    torch.testing.assert_close(part.output_rows[used], full.output_rows[used])
    new = align(model.vocabulary, full.vocabulary).new
    full._model.absent = new[~torch.isin(new, used)]
    assert found.bits == pytest.approx(full.score(TEXT).bits, abs=1e-5)
    full._model.absent = None
    assert sum(found.bits) < sum(full.score(TEXT).bits)
    with pytest.raises(Unsupported, match="no row to write"):
        part.generate(TEXT, Decoding(max_new_tokens=2))


def test_what_a_text_costs_does_not_depend_on_the_texts_before_it(
    donor_folders: dict[str, str],
) -> None:
    model = tiny_lm()
    method = OmpTransplant(k=5, donor=donor_folders["other"], rows="text")
    first = transplanted(method, model).score(TEXT).bits
    changed = transplanted(method, model)
    changed.score("everywhere the dogs were jumping to the sea")
    assert changed.score(TEXT).bits == first


# --- hidden tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_hidden_tokens_are_made_anew_and_never_used(cls: type[VocabularyTransplant]) -> None:
    model = tiny_lm()
    method = small(cls, donor="same", hide=0.2)
    changed = transplanted(method, model)
    rows, own = changed.input_rows, model.input_rows
    differs = (rows != own).any(dim=1).nonzero()[:, 0]
    alignment = align(model.vocabulary, model.vocabulary)
    _, hidden = without(alignment, model.vocabulary, 0.2)
    plain = [key for key in model.vocabulary.keys if key is not None and key.kind != "special"]
    assert set(differs.tolist()) == hidden
    assert len(hidden) == round(0.2 * len(plain))
    _, nearly_all = without(alignment, model.vocabulary, 0.999)
    kinds = {key.kind for token in nearly_all if (key := model.vocabulary.keys[token]) is not None}
    assert len(nearly_all) >= len(plain) - 1
    assert "special" not in kinds
    spoiled = tiny_lm()
    with torch.no_grad():
        table = spoiled.module.get_input_embeddings().weight
        # Means over the whole table may look at every row; sums over shared tokens may not.
        if cls not in (MeanRows, RandomRows):
            table[sorted(hidden)] = table[sorted(hidden)].flip(0)
    space = Space(
        own, spoiled.input_rows, *without(alignment, model.vocabulary, 0.2)[0][1:3],
        model.vocabulary, model.vocabulary, model.tokenizer, hidden,
    )  # fmt: skip
    torch.testing.assert_close(method.new_rows(space, differs), rows[differs])


def test_a_hidden_token_is_spelled_by_the_longest_tokens_left() -> None:
    model = tiny_lm()
    keys = model.vocabulary.keys
    number = keys.index(TokenKey("word", b"the"))
    space = Space(
        model.input_rows, model.input_rows, torch.tensor([]), torch.tensor([]),
        model.vocabulary, model.vocabulary, model.tokenizer, frozenset({number}),
    )  # fmt: skip
    ids = Speller(space).pieces(number)
    assert number not in ids
    assert model.tokenizer.decode(ids) == " the"
    assert Speller(space._replace(hidden=frozenset())).pieces(number) == [number]


# --- what is left behind --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["all", "text"])
def test_the_model_is_untouched_and_the_tables_are_made_once(
    rows: Any, donor_folders: dict[str, str]
) -> None:
    model, other = tiny_lm(), tiny_lm(seed=1)
    before = {name: each.clone() for name, each in model.module.state_dict().items()}
    method = OmpTransplant(k=5, donor=donor_folders["other"], rows=rows)
    with method.apply(model, PROFILE) as first:
        first.score(TEXT)
    again = method.apply(model, PROFILE)
    assert again.__enter__() is first
    assert not again.__exit__(RuntimeError, RuntimeError("on purpose"), None)  # not swallowed
    with method.apply(other, PROFILE) as second:
        assert second.score(TEXT).bits != first.score(TEXT).bits
    with method.apply(model, PROFILE) as third:
        assert third is first
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(method._kept) == 2
    del other, second, again, third
    gc.collect()
    with method.apply(model, PROFILE):
        assert len(method._kept) == 1


@pytest.mark.parametrize("cls", [*ALL, NativeTokenizer])
def test_a_model_without_tables_is_declined_with_what_it_lacks(cls: Any) -> None:
    class Nothing:
        name = "nothing"

    with pytest.raises(Unsupported, match="'nothing'"), cls().apply(Nothing(), PROFILE):
        pass


@pytest.mark.parametrize("cls", ALL)
def test_settings_survive_json_and_wrong_ones_are_refused(cls: type[VocabularyTransplant]) -> None:
    method = cls(donor="same")
    assert cls(**json.loads(json.dumps(method.parameters()))) == method
    with pytest.raises(ValueError, match="rows must be one of all, text"):
        cls(rows="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="donor must name"):
        cls(donor="")


def test_a_donor_that_is_not_there_is_an_answer(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="python-bpe"):
        transplanted(OmpTransplant(donor=f"path:{tmp_path}"), tiny_lm())


def test_the_projects_donor_works_on_a_tiny_model() -> None:
    model = tiny_lm()
    changed = transplanted(OmpTransplant(k=16, rows="text"), model)
    text = "def theatre(self):\n    return self.mat[0]"
    scored = changed.score(text)
    assert scored.decoded == text
    assert np.isfinite(scored.bits).all()


# --- the rivals -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_space(donor_folders: dict[str, str]) -> tuple[Space, Tensor]:
    model = tiny_lm(spare_rows=5)
    space = space_of(model, donor_folders["other"])
    return space, align(model.vocabulary, space.donor_vocabulary).new


def test_zero_mean_and_random_rows_are_what_they_say(tiny_space: tuple[Space, Tensor]) -> None:
    space, new = tiny_space
    assert not ZeroRows().new_rows(space, new).any()
    tokens = space.base[: len(space.base_vocabulary)]
    expected = tokens.mean(dim=0).expand(len(new), -1)
    torch.testing.assert_close(MeanRows().new_rows(space, new), expected)
    everything = torch.arange(len(space.donor_vocabulary))
    drawn = torch.cat([RandomRows(seed=s).new_rows(space, everything) for s in range(20)])
    # Of 6,400 draws: within five standard errors of mean and standard deviation.
    error = tokens.std(dim=0) / len(drawn) ** 0.5
    assert ((drawn.mean(dim=0) - tokens.mean(dim=0)).abs() < 5 * error).all()
    torch.testing.assert_close(drawn.std(dim=0), tokens.std(dim=0), rtol=0.06, atol=0)
    covariance = torch.cov(tokens.T)
    assert (torch.cov(drawn.T) - covariance).norm() < 0.2 * covariance.norm()
    alone = RandomRows(seed=1).new_rows(space, new[3:4])
    assert torch.equal(alone, RandomRows(seed=1).new_rows(space, new)[3:4])
    assert not torch.equal(alone, RandomRows(seed=2).new_rows(space, new[3:4]))


def test_a_subword_mean_is_the_mean_of_the_old_tokens(tiny_space: tuple[Space, Tensor]) -> None:
    space, new = tiny_space
    rows = SubwordMean().new_rows(space, new)
    for row, token in zip(rows, new.tolist(), strict=True):
        key = space.donor_vocabulary.keys[token]
        assert key is not None
        text = key_text(key)
        assert text is not None
        ids = space.base_tokenizer.encode(text)
        torch.testing.assert_close(row, torch.stack([space.base[each] for each in ids]).mean(0))
        assert space.base_tokenizer.decode(ids) == text


def test_half_a_character_is_spelled_in_bytes_and_special_tokens_have_no_pieces() -> None:
    model = tiny_lm()
    donor = vocabulary(TokenKey("inner", "né".encode()[:2]), TokenKey("special", b"<x>"))
    space = Space(
        torch.zeros(2, 4), model.input_rows, torch.tensor([]), torch.tensor([]), donor,
        model.vocabulary, model.tokenizer,
    )  # fmt: skip
    ids = Speller(space).pieces(0)
    assert [model.vocabulary.keys[each].content for each in ids] == [b"n", b"\xc3"]  # type: ignore[union-attr]
    assert Speller(space).pieces(1) == []
    mean = model.input_rows.mean(dim=0)
    torch.testing.assert_close(SubwordMean().new_rows(space, torch.tensor([1]))[0], mean)


def test_averages_over_likes_are_those_of_a_plain_loop(tiny_space: tuple[Space, Tensor]) -> None:
    space, new = tiny_space
    shared = space.donor[space.shared_donor].double().numpy()
    base = space.base[space.shared_base].double().numpy()
    focus, wechsel = (m.new_rows(space, new[:6]).numpy() for m in (FocusLike(), WechselLike()))
    for place, token in enumerate(new[:6].tolist()):
        vector = space.donor[token].double().numpy()
        cosines = shared @ vector / np.linalg.norm(shared, axis=1) / np.linalg.norm(vector)
        nearest = np.argsort(-cosines)[:10]
        weights = np.exp(cosines[nearest] / 0.1)
        expected = (weights / weights.sum()) @ base[nearest]
        np.testing.assert_allclose(wechsel[place], expected, atol=1e-4)
        low, high = cosines.min() - 1, cosines.max()  # sparsemax by bisection of its threshold
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if (cosines - middle).clip(0).sum() > 1 else (low, middle)
        np.testing.assert_allclose(focus[place], (cosines - low).clip(0) @ base, atol=1e-4)


def test_wechsel_declines_more_neighbours_than_there_are(tiny_space: tuple[Space, Tensor]) -> None:
    space, new = tiny_space
    with pytest.raises(Unsupported, match="more than the"):
        WechselLike(neighbours=1000).new_rows(space, new)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        WechselLike(temperature=0)


def test_the_native_tokenizer_yields_the_model_itself() -> None:
    model = tiny_lm()
    with NativeTokenizer().apply(model, PROFILE) as same:
        assert same is model
