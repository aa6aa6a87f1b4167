"""Scores are the model's own cross-entropy, and other tables leave the wrapped model alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from models.base import Decoding, InvalidOutput, TextGenerator, TokenizedLM, Unsupported
from models.constraints import _byte_alphabet
from models.loading import LoadSettings, ModelError, donors
from models.text import CausalLM
from models.tokenized import (
    CausalTokenizedLM,
    PlainTokenizer,
    ReplaceableVocabulary,
    TokenKey,
    Vocabulary,
    donor_of,
    load_donor,
    load_tokenized,
    start_token,
    vocabulary_of,
    windows,
)
from tests.models.tokenizers_zoo import TEXTS, byte_level, sentence_piece, tiny_lm, word_piece

ARCHITECTURES = ("llama", "qwen2", "mistral-sliding-window", "gemma2", "gpt2")
TEXT = "the cat sat on the flat mat, and there was a theatre."


def cross_entropy_bits(model: CausalTokenizedLM, text: str) -> list[float]:
    """The definition: one forward over start token and text."""
    ids = [model.vocabulary.roles["start"], *model.tokenizer.encode(text)]
    with torch.inference_mode():
        logits = model.module(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return (losses / math.log(2)).tolist()


# --- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_score_is_the_cross_entropy_of_every_token_in_bits(architecture: str) -> None:
    model = tiny_lm(architecture)
    scored = model.score(TEXT)
    assert scored.bits == pytest.approx(cross_entropy_bits(model, TEXT), abs=1e-4)
    assert scored.token_ids == tuple(model.tokenizer.encode(TEXT))
    assert (scored.decoded, scored.num_bytes) == (TEXT, len(TEXT))
    assert scored.bits_per_byte == pytest.approx(sum(scored.bits) / len(TEXT))
    (forward,) = scored.trace.prefill
    assert forward.width == len(scored.bits)
    assert scored.trace.flops == model.facts.flops(forward)


def test_bytes_are_counted_in_utf8_and_the_empty_text_costs_nothing() -> None:
    model = tiny_lm()
    assert model.score("caf\u00e9").num_bytes == 5
    empty = model.score("")
    assert (empty.bits, empty.token_ids, empty.num_bytes) == ((), (), 0)
    assert math.isnan(empty.bits_per_byte)


def test_a_long_text_is_scored_window_by_window_behind_half_a_window_of_context() -> None:
    model = tiny_lm(window=8)
    scored = model.score(TEXT)
    ids, start = list(scored.token_ids), model.vocabulary.roles["start"]
    expected: list[float] = []
    while len(expected) < len(ids):
        first = len(expected)
        begin = first - 4 if first else 0
        fed = [start, *ids[begin : begin + 8]][:8]
        with torch.inference_mode():
            logits = model.module(torch.tensor([fed])).logits[0].double().log_softmax(-1)
        targets = ids[begin : begin + 8]
        costs = [-float(logits[i, t]) / math.log(2) for i, t in enumerate(targets)]
        expected += costs[first - begin :]
    assert scored.bits == pytest.approx(expected, abs=1e-4)
    assert max(forward.width for forward in scored.trace.prefill) == 8


@given(num_tokens=st.integers(0, 200), width=st.integers(2, 40))
def test_windows_hold_every_token_once_and_enough_context(num_tokens: int, width: int) -> None:
    new: list[int] = []
    for window in windows(num_tokens, width):
        assert window.end - window.begin <= width
        assert window.first == 0 or window.first - window.begin == width // 2
        new += range(window.first, window.end)
    assert new == list(range(num_tokens))


def test_the_window_is_no_longer_than_the_models_context() -> None:
    assert tiny_lm(window=10_000).window == 256
    with pytest.raises(ValueError, match="at least 2"):
        tiny_lm(window=1)


def test_numbers_that_are_none_are_refused() -> None:
    model = tiny_lm()
    rows = model.input_rows.clone()
    rows[model.tokenizer.encode("the")] = float("nan")
    broken = model.with_vocabulary(model.tokenizer, model.vocabulary, rows)
    with pytest.raises(InvalidOutput, match="no finite cost"):
        broken.score(TEXT)


def test_absent_tokens_get_no_probability() -> None:
    model = tiny_lm()
    plain = model.score("the cat")
    others = sorted(set(range(len(model.vocabulary))) - set(plain.token_ids))
    model.absent = torch.tensor(others)
    alone = model.score("the cat")
    assert sum(alone.bits) < sum(plain.bits)
    ids = torch.tensor(plain.token_ids)
    with torch.inference_mode():
        fed = torch.tensor([[model.vocabulary.roles["start"], *plain.token_ids[:-1]]])
        logits = model.module(fed).logits[0].double()
    kept = logits[:, ids.unique()].logsumexp(-1)
    expected = (kept - logits[torch.arange(len(ids)), ids]) / math.log(2)
    assert alone.bits == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(Unsupported, match="have no row to write"):
        model.generate("the", Decoding(max_new_tokens=2))


def test_generation_is_that_of_the_model_behind_its_start_token() -> None:
    model = tiny_lm()
    decoding = Decoding(max_new_tokens=12)
    inner = CausalLM(model.module, model.tokenizer, "inner", kernels="transformers")
    prompt = [model.vocabulary.roles["start"], *model.tokenizer.encode("the cat")]
    expected = inner.generate(prompt, decoding)
    found = model.generate("the cat", decoding)
    assert (found.token_ids, found.text) == (expected.token_ids, expected.text)


def test_it_is_a_tokenized_model_and_no_text_generator() -> None:
    model = tiny_lm()
    assert isinstance(model, TokenizedLM)
    assert isinstance(model, ReplaceableVocabulary)
    assert not isinstance(model, TextGenerator)
    assert not isinstance(CausalLM(model.module, model.tokenizer, "x"), TokenizedLM)


# --- surgery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral-sliding-window"])
def test_the_same_tables_give_the_same_model_to_the_bit(architecture: str, tied: bool) -> None:
    model = tiny_lm(architecture, tied=tied)
    output = None if tied else model.output_rows.clone()
    other = model.with_vocabulary(
        model.tokenizer, model.vocabulary, model.input_rows.clone(), output
    )
    assert other.is_tied == tied
    assert other.facts == model.facts
    assert other.score(TEXT).bits == model.score(TEXT).bits
    decoding = Decoding(max_new_tokens=10)
    assert other.generate(TEXT, decoding).token_ids == model.generate(TEXT, decoding).token_ids


@pytest.mark.parametrize("tied", [True, False])
def test_surgery_shares_the_body_and_leaves_the_wrapped_model_as_it_was(tied: bool) -> None:
    model = tiny_lm(tied=tied)
    before = {name: each.clone() for name, each in model.module.state_dict().items()}
    config = copy.deepcopy(model.module.config.to_dict())
    defaults = copy.deepcopy(model.module.generation_config.to_dict())
    rows = torch.ones(400, model.input_rows.shape[1])
    other = model.with_vocabulary(
        model.tokenizer, model.vocabulary, rows, None if tied else rows * 2
    )
    assert other.facts.vocab_size == other.module.config.vocab_size == 400
    other.score(TEXT)
    with torch.no_grad():
        other.module.get_input_embeddings().weight.fill_(7)
    after = model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.module.config.to_dict() == config
    assert model.module.generation_config.to_dict() == defaults
    ours, theirs = dict(model.module.named_parameters()), dict(other.module.named_parameters())
    tables = {name for name in ours if ours[name] is not theirs[name]}
    inner = {name for name in ours if "embed_tokens" in name or "lm_head" in name}
    assert tables == inner


def test_every_token_that_ends_a_text_goes_on_doing_so_under_its_new_id() -> None:
    model = tiny_lm()
    module = copy.deepcopy(model.module)
    module.config.eos_token_id = module.generation_config.eos_token_id = [0, 1, 7, 5000]
    base = CausalTokenizedLM(module, model.tokenizer, "several ends", model.vocabulary)
    assert base.facts.eos_ids == {0, 1, 7}  # no token has id 5000
    (end, other, word), rest = model.vocabulary.keys[:3], model.vocabulary.keys[3:]
    assert other == TokenKey("special", b"<|pad|>")
    # A plain word that ends texts of the base by its id ends none of the donor's.
    assert rest[4] is not None
    assert rest[4].kind != "special"
    moved = Vocabulary((word, other, *rest, end), {"end": len(model.vocabulary) - 1})
    changed = base.with_vocabulary(model.tokenizer, moved, base.input_rows.clone())
    assert changed.facts.eos_ids == {1, len(moved) - 1}
    assert changed.module.config.eos_token_id == [1, len(moved) - 1]
    assert changed.module.generation_config.eos_token_id == [1, len(moved) - 1]
    without = Vocabulary((word, None, *rest, word), {})
    changed = base.with_vocabulary(model.tokenizer, without, base.input_rows.clone())
    assert changed.facts.eos_ids == frozenset()
    assert changed.module.config.eos_token_id is None


def test_the_layers_say_the_sizes_of_the_tables_and_no_row_is_padding() -> None:
    model = tiny_lm()
    module = copy.deepcopy(model.module)
    module.get_input_embeddings().padding_idx = 1
    base = CausalTokenizedLM(module, model.tokenizer, "padded", model.vocabulary)
    rows = torch.ones(len(model.vocabulary) + 11, base.input_rows.shape[1])
    changed = base.with_vocabulary(model.tokenizer, model.vocabulary, rows).module
    embedding, head = changed.get_input_embeddings(), changed.get_output_embeddings()
    assert (embedding.num_embeddings, embedding.padding_idx) == (len(rows), None)
    assert head.out_features == len(rows)
    assert module.get_input_embeddings().padding_idx == 1


def test_tables_that_do_not_fit_are_refused() -> None:
    model = tiny_lm()
    width, size = model.input_rows.shape[1], len(model.vocabulary)
    for rows, output, reason in (
        (torch.zeros(size, width + 1), None, "input_rows must be"),
        (torch.zeros(size, width), torch.zeros(size - 1, width), "output_rows must be"),
        (torch.zeros(size - 1, width), None, "too few"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.with_vocabulary(model.tokenizer, model.vocabulary, rows, output)


def test_an_output_head_with_a_bias_is_refused() -> None:
    model = tiny_lm()
    module = copy.deepcopy(model.module)
    module.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.vocabulary)))
    with pytest.raises(Unsupported, match="has a bias"):
        CausalTokenizedLM(module, model.tokenizer, "biased", model.vocabulary)


# --- vocabularies ---------------------------------------------------------------------------------


def keys_of(hub) -> dict[str, TokenKey]:
    keys = vocabulary_of(hub).keys
    return {name: keys[number] for name, number in hub.get_vocab().items()}


def test_three_spellings_of_a_word_are_one_key() -> None:
    word, inner = TokenKey("word", b"the"), TokenKey("inner", b"the")
    byte, piece, sentence = keys_of(byte_level()), keys_of(word_piece()), keys_of(sentence_piece())
    assert byte["\u0120the"] == piece["the"] == sentence["▁the"] == word
    assert sentence["the"] == inner
    assert byte["t"] == piece["##t"] == sentence["t"] == TokenKey("inner", b"t")


def test_punctuation_stands_bare_and_bytes_are_told_from_characters() -> None:
    piece, sentence, byte = keys_of(word_piece()), keys_of(sentence_piece()), keys_of(byte_level())
    assert piece[","] == byte[","] == TokenKey("inner", b",")
    assert sentence["<0x41>"] == TokenKey("byte", b"A")
    assert sentence["A"] == byte["A"] == TokenKey("inner", b"A")
    assert byte["\u0120"] == TokenKey("word", b"")
    assert keys_of(byte_level())["\u00c3"] == TokenKey("inner", b"\xc3")  # half a character


def test_every_byte_has_its_own_key_in_a_byte_level_vocabulary() -> None:
    keys = keys_of(byte_level())
    contents = {keys[letter] for letter in _byte_alphabet()}
    assert len(contents) == 256


def test_special_tokens_play_parts() -> None:
    assert vocabulary_of(word_piece()).roles == {
        "start": 2, "end": 3, "padding": 0, "unknown": 1, "mask": 4,
    }  # fmt: skip
    assert vocabulary_of(byte_level()).roles == {"start": 0, "end": 0, "padding": 1}
    assert start_token(sentence_piece()) == 1
    assert keys_of(word_piece())["[CLS]"] == TokenKey("special", b"[CLS]")


def test_a_plain_tokenizer_adds_nothing_cuts_nothing_and_keeps_spaces() -> None:
    tokenizer = PlainTokenizer(word_piece())
    text = "the cat , the dog ; the mat ! and the theatre was hot"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) > 8
    assert not {2, 3}.intersection(ids)  # [CLS] and [SEP]


def test_several_marks_and_brackets_are_words_and_only_a_single_mark_stands_bare() -> None:
    names = ["[UNK]", "...", ".", "[unused1]", "##", "##.", "a", "7", "\u4e2d", "\u2019"]
    core = Tokenizer(WordPiece({name: at for at, name in enumerate(names)}, unk_token="[UNK]"))
    keys = keys_of(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"))
    assert keys.pop("[UNK]").kind == "special"
    assert {name: (key.kind, key.content.decode()) for name, key in keys.items()} == {
        "...": ("word", "..."),
        ".": ("inner", "."),
        "[unused1]": ("word", "[unused1]"),
        "##": ("word", "##"),
        "##.": ("inner", "."),
        "a": ("word", "a"),
        "7": ("word", "7"),
        "\u4e2d": ("word", "\u4e2d"),
        "\u2019": ("inner", "\u2019"),
    }


def test_added_tokens_are_special_where_they_say_so_and_gaps_between_ids_have_no_key() -> None:
    core = Tokenizer(BPE({"<|endoftext|>": 0, "\u0120the": 5, "a": 2}, []))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.add_tokens([AddedToken("cat", special=False), AddedToken("<tool>", special=True)])
    hub = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    vocabulary, ids = vocabulary_of(hub), hub.get_vocab()
    assert vocabulary.keys[ids["cat"]] == TokenKey("inner", b"cat")
    assert vocabulary.keys[ids["<tool>"]] == TokenKey("special", b"<tool>")
    assert len(vocabulary) == max(ids.values()) + 1
    assert {at for at, key in enumerate(vocabulary.keys) if key is None} == (
        set(range(len(vocabulary))) - set(ids.values())
    )
    assert vocabulary.keys[1] is None


def test_a_text_begins_with_what_is_put_there_or_with_the_end_of_the_text_before() -> None:
    names = {"<|endoftext|>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}

    def hub(first: str | None, **special: str) -> PreTrainedTokenizerFast:
        core = Tokenizer(WordLevel(names, unk_token="b"))
        core.pre_tokenizer = WhitespaceSplit()
        if first:
            core.post_processor = TemplateProcessing(
                single=f"{first} $A", special_tokens=[(first, names[first])]
            )
        return PreTrainedTokenizerFast(tokenizer_object=core, **special)

    assert start_token(hub("<s>", bos_token="<s>")) == 1
    assert start_token(hub(None, bos_token="<s>", eos_token="</s>")) == 0
    assert start_token(hub("b", bos_token="<s>")) == 0  # an ordinary word in front begins nothing
    del names["<|endoftext|>"]
    assert start_token(hub(None, bos_token="<s>", eos_token="</s>")) == 1
    assert start_token(hub(None, eos_token="</s>")) == 2
    assert start_token(hub(None)) is None


# --- donors ---------------------------------------------------------------------------------------


def test_the_projects_donors_can_be_loaded_and_restore_a_text() -> None:
    assert donors() == ["python-bpe", "python-bpe-grouped"]
    text = "def f(self):\n    return 'caf\u00e9', 2026\n"
    tokens = {}
    for name in donors():
        donor = load_donor(name)
        assert donor.input_rows.shape == (8192, 128)
        assert donor.output_rows is None
        assert donor.vocabulary.roles["start"] == 0
        ids = donor.tokenizer.encode(text)
        assert donor.tokenizer.decode(ids) == text
        tokens[name] = [donor.vocabulary.keys[token].content for token in ids]  # type: ignore[union-attr]
    assert [each for each in tokens["python-bpe"] if each.isdigit()] == [b"2", b"0", b"2", b"6"]
    assert [each for each in tokens["python-bpe-grouped"] if each.isdigit()] == [b"202", b"6"]


def test_a_donor_is_read_from_a_folder_with_its_head(tmp_path: Path) -> None:
    model = tiny_lm(tied=False)
    model.module.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    donor = load_donor(f"path:{tmp_path}")
    assert torch.equal(donor.input_rows, model.input_rows)
    assert donor.output_rows is not None
    assert torch.equal(donor.output_rows, model.output_rows)
    assert donor.vocabulary == model.vocabulary
    own = donor_of(model)
    assert torch.equal(own.input_rows, donor.input_rows)
    assert own.input_rows.data_ptr() != model.input_rows.data_ptr()


def test_a_head_that_is_the_embedding_again_is_none_of_its_own(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    rows = torch.randn(len(byte_level()), 8, generator=torch.Generator().manual_seed(0))
    tables = {"embed_tokens.weight": rows, "lm_head.weight": rows.clone()}
    save_file(tables, tmp_path / "model.safetensors")
    assert load_donor(f"path:{tmp_path}").output_rows is None
    tables["lm_head.weight"][3, 3] += 1
    save_file(tables, tmp_path / "model.safetensors")
    assert load_donor(f"path:{tmp_path}").output_rows is not None


def test_a_folder_without_an_embedding_or_with_too_few_rows_is_no_donor(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    save_file({"something.weight": torch.zeros(3, 3)}, weights)
    with pytest.raises(ModelError, match="holds an input embedding"):
        load_donor(f"path:{tmp_path}")
    save_file({"embed_tokens.weight": torch.zeros(3, 3)}, weights)
    with pytest.raises(ModelError, match="do not belong together"):
        load_donor(f"path:{tmp_path}")
    with pytest.raises(ModelError, match=r"python-bpe, python-bpe-grouped"):
        load_donor("python-bpee")


def test_a_model_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    model = tiny_lm()
    model.module.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    settings = LoadSettings(device="cpu")
    loaded = load_tokenized(tmp_path, "path:x", settings, tmp_path)
    assert loaded.score(TEXTS[0]).bits == pytest.approx(model.score(TEXTS[0]).bits, abs=1e-5)
    assert loaded.is_tied
    with pytest.raises(Unsupported, match="not on native"):
        load_tokenized(tmp_path, "path:x", LoadSettings(kernels="native"), tmp_path)
