"""Encoders against transformers and sentence-transformers, and by what must not change a vector."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor

from models.base import TextEncoder, Unsupported
from models.encoders import (
    TEMPLATES,
    Batching,
    CausalEncoder,
    PromptBatch,
    ReadOut,
    SentenceEncoder,
    cleaned,
    load_encoder,
)
from models.loading import LoadSettings, ModelError, load
from models.tokenization import HubTokenizer
from tasks.mteb_mini import load_mini
from tests.models.tiny import ARCHITECTURES

TEXTS = (
    "A man plays the flute in the rain.",
    "rain",
    'She said "stop" and he, of course, did not',
    "Does a glacier move under its own weight, or does the ground carry it away?",
    "two words",
)
FAMILIES = ("llama", "qwen2", "mistral-sliding-window", "gemma", "gemma2", "gpt2")


@functools.cache
def tokenizer(*, with_ends: bool = False) -> HubTokenizer:
    """Return a byte-level tokenizer with merges, trained here; it can put `<s> </s>` around."""
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [*TEXTS, *TEMPLATES["prompteol"], *TEMPLATES["knowledge"], 'it."', 'go."', 'on."'] * 3
    backend.train_from_iterator(corpus, trainer)
    if with_ends:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return HubTokenizer(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
        )
    )


@functools.cache
def module(family: str) -> Any:
    class_name, sizes = ARCHITECTURES[family]
    longest = {"n_positions": 1024} if family == "gpt2" else {"max_position_embeddings": 1024}
    model_class = getattr(transformers, class_name)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    made = model_class(model_class.config_class(**{**sizes, "vocab_size": 420, **longest}))
    torch.random.set_rng_state(state)
    return made.eval()


def encoder(
    family: str = "llama", *, with_ends: bool = False, batch_size: int = 16, **read_out: Any
) -> CausalEncoder:
    return CausalEncoder(
        module(family),
        tokenizer(with_ends=with_ends),
        f"tiny-{family}",
        read_out=ReadOut(**read_out),
        batching=Batching(batch_size=batch_size),
    )


def states_of(family: str, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """Return transformers' own hidden states of one unpadded text, (tokens, dimension) each."""
    with torch.inference_mode():
        output = module(family)(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    return tuple(each[0] for each in output.hidden_states)


def apart(first: Any, second: Any) -> float:
    """Return the largest difference, relative to the size of the second."""
    one, other = np.asarray(first), np.asarray(second)
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


def hooks_of(model: CausalEncoder) -> list[tuple[int, ...]]:
    """Return the ids of all hooks; transformers may have put some of its own there."""
    return [
        (*each._forward_hooks, *each._forward_pre_hooks, *each._forward_hooks_with_kwargs)
        for each in model.module.modules()
    ]


# --- what is read ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -2])
def test_a_last_token_is_transformers_hidden_state(family: str, layer: int) -> None:
    found = encoder(family, layer=layer).encode(TEXTS)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        [prompt] = encoder(family).prompts(text)
        assert apart(vector, states_of(family, prompt.ids)[layer][-1]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mean_is_over_the_texts_own_tokens(family: str) -> None:
    found = encoder(family, pooling="mean", layer=2).encode(TEXTS)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        [prompt] = encoder(family).prompts(text)
        states = states_of(family, prompt.ids)[2]
        tokens = [states[place] for place in prompt.text_tokens]
        assert apart(vector, torch.stack(tokens).mean(0)) < 1e-4


@pytest.mark.parametrize("prompt", ["plain", "prompteol", "cot", "knowledge", "metaeol", "echo"])
@given(text=st.text(min_size=1, max_size=40).filter(str.strip))
@settings(max_examples=25, deadline=None)
def test_text_tokens_are_the_text_and_the_prompts_end_is_kept(prompt: Any, text: str) -> None:
    made = encoder(prompt=prompt, max_tokens=500)
    quoting = '"{text}"' in TEMPLATES[prompt][0]
    expected = cleaned(text) if quoting else text
    for template, each in zip(TEMPLATES[prompt], made.prompts(text), strict=True):
        whole = made.tokenizer.decode(each.ids)
        assert whole == template.replace("{placeholder}", "").replace("{text}", expected)
        inner = made.tokenizer.decode(each.ids[each.text_tokens.start : each.text_tokens.stop])
        # Merged tokens reach over the text's ends by the characters that they share with them.
        assert expected.strip() in inner
        assert len(inner) <= len(expected) + 4


@pytest.mark.parametrize("prompt", ["prompteol", "knowledge", "echo"])
@pytest.mark.parametrize("text", [*TEXTS, "a 'cat'"])
def test_no_token_of_the_prompt_is_one_of_the_texts(prompt: Any, text: str) -> None:
    made = encoder(prompt=prompt)
    [found] = made.prompts(text)
    inner = found.ids[found.text_tokens.start : found.text_tokens.stop]
    expected = text if prompt == "echo" else cleaned(text)
    assert expected in made.tokenizer.decode(inner)
    # Each token at an end holds a part of it.
    assert expected not in made.tokenizer.decode(inner[1:])
    assert expected not in made.tokenizer.decode(inner[:-1])


def test_echo_reads_the_second_time() -> None:
    [prompt] = encoder(prompt="echo").prompts(TEXTS[0])
    half = len(prompt.ids) // 2
    assert prompt.text_tokens.start > half
    vector = encoder(prompt="echo", pooling="mean", layer=2).encode(TEXTS[:1]).vectors[0]
    states = states_of("llama", prompt.ids)[2]
    assert apart(vector, states[prompt.text_tokens.start :].mean(0)) < 1e-4


def test_metaeol_is_the_mean_of_eight_prompts() -> None:
    found = encoder(prompt="metaeol", layer=-1).encode(TEXTS[:2])
    for row, text in enumerate(TEXTS[:2]):
        prompts = encoder(prompt="metaeol").prompts(text)
        assert len(prompts) == 8
        ends = [states_of("llama", prompt.ids)[-1][-1] for prompt in prompts]
        assert apart(found.vectors[row], torch.stack(ends).mean(0)) < 1e-4
        assert found.token_counts[row] == sum(len(prompt.ids) for prompt in prompts)
    assert len(found.trace.prefill) == 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "a cat."),
        ("a cat.", "a cat."),
        ("a cat?", "a cat."),
        ('say "no"', "say 'no'"),
        ("it's '", "it's '"),
        ("wow!", "wow!."),
        ("", ""),
        ('?"', "?'"),
    ],
)
def test_sentences_are_cleaned_as_the_card_says(text: str, expected: str) -> None:
    assert cleaned(text) == expected


def test_a_text_is_cut_and_the_prompt_around_it_is_not() -> None:
    long = " ".join(["flute"] * 300)
    made = encoder(max_tokens=12)
    [prompt] = made.prompts(long)
    whole = made.tokenizer.decode(prompt.ids)
    assert whole.startswith('This sentence : "flute flute')
    assert whole.endswith('." means in one word:"')
    kept = tokenizer().encode(long)[:12]
    assert tokenizer().decode(kept) in whole
    assert tokenizer().decode(tokenizer().encode(long)[:13]) not in whole


def test_special_tokens_stay_in_front_and_go_behind() -> None:
    made = encoder(with_ends=True)
    [prompt] = made.prompts("a cat")
    assert prompt.ids[0] == 0
    assert prompt.ids[1:] == tokenizer().encode('This sentence : "a cat." means in one word:"')
    # One that the text itself holds is a part of it.
    [prompt] = encoder(with_ends=True, prompt="plain").prompts("a cat</s>")
    assert prompt.ids == [0, *tokenizer().encode("a cat"), 1]


def test_special_tokens_are_none_of_those_that_are_kept() -> None:
    long = " ".join(["flute"] * 300)
    [bare] = encoder(prompt="plain", max_tokens=12).prompts(long)
    [marked] = encoder(prompt="plain", max_tokens=12, with_ends=True).prompts(long)
    assert len(bare.ids) == 12
    assert marked.ids == [0, *bare.ids]


def test_a_text_without_tokens_has_a_vector_too() -> None:
    for pooling in ("last", "mean"):
        found = encoder(prompt="plain", pooling=pooling).encode(["", "a cat"])
        assert np.isfinite(found.vectors).all()
        assert found.token_counts[0] == 1
    # Read as the token that begins a text, whose id here is 0.
    [prompt] = encoder(prompt="plain").prompts("")
    assert prompt.ids == [0]


def test_no_texts_are_no_vectors() -> None:
    assert encoder().encode([]).vectors.shape == (0, 64)


# --- what must not matter ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompt", "pooling"), [("plain", "last"), ("prompteol", "mean")])
def test_a_vector_depends_on_its_own_text_alone(family: str, prompt: Any, pooling: Any) -> None:
    made = encoder(family, prompt=prompt, pooling=pooling, layer=-1)
    alone = np.concatenate([made.encode([text]).vectors for text in TEXTS])
    for batching in (
        Batching(batch_size=5),
        Batching(batch_size=5, sort_by_length=False),
        Batching(batch_size=2),
    ):
        together = made.configured(batching=batching).encode(TEXTS)
        assert apart(together.vectors, alone) < 1e-4


def test_the_same_text_has_cosine_one_with_itself() -> None:
    first, second = encoder().encode([TEXTS[0], TEXTS[0]]).vectors
    assert np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second) > 1 - 1e-6


def test_other_settings_leave_the_first_encoder_alone() -> None:
    made = encoder()
    before = made.encode(TEXTS).vectors
    other = made.configured(read_out=ReadOut(prompt="plain", layer=1))
    few = made.configured(batching=Batching(batch_size=2))
    assert few.read_out is made.read_out
    assert few.configured(read_out=other.read_out).batching is few.batching
    assert other.facts.num_layers == 1
    assert not np.allclose(other.encode(TEXTS).vectors, before)
    assert made.facts.num_layers == 3
    assert np.array_equal(made.encode(TEXTS).vectors, before)


# --- work ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_behind_the_one_that_is_read_do_not_run(family: str) -> None:
    made = encoder(family, layer=1)
    layers = made.body.h if family == "gpt2" else made.body.layers
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(layers)
    ]
    try:
        made.encode(TEXTS)
    finally:
        for handle in handles:
            handle.remove()
    assert set(ran) == {0}


def test_no_hook_is_left_behind_even_after_an_exception() -> None:
    made = encoder(layer=2)
    row = torch.zeros(64)
    before = hooks_of(made)

    def broken(layer: int, states: Tensor, batch: PromptBatch) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        made.embed(TEXTS, before_layer=broken, placeholder=row)
    assert hooks_of(made) == before
    made.embed(TEXTS, before_layer=lambda *_: None, placeholder=row)
    assert hooks_of(made) == before


def test_operations_are_those_of_the_layers_that_run() -> None:
    made = encoder(layer=2, batch_size=1)
    found = made.encode(TEXTS[:1])
    tokens = found.token_counts[0]
    # q and o 64x64, k and v 64x32, three matrices of the network 64x96.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    attention = 4 * 4 * 16 * tokens * (tokens + 1) / 2
    assert found.trace.flops == pytest.approx(2 * (2 * layer * tokens + attention))
    assert made.facts.matrix_parameters == 2 * layer
    assert made.facts.weight_bytes == 4 * 2 * layer
    assert made.facts.dtype == "float32"
    assert found.trace.notes == {"layers": 2, "padded_tokens": tokens}
    assert [forward.width for forward in found.trace.prefill] == [tokens]
    assert list(found.trace.marks) == ["tokenized", "encoded"]


def test_the_transposed_matrices_of_gpt2_are_counted() -> None:
    config = module("gpt2").config
    inner = config.n_inner or 4 * config.n_embd
    layer = 4 * config.n_embd**2 + 2 * config.n_embd * inner
    assert encoder("gpt2").facts.matrix_parameters == config.n_layer * layer


def test_the_longest_texts_come_first() -> None:
    lengths = [2, 9, 4, 9, 1]
    assert list(Batching(batch_size=2).batches(lengths)) == [[1, 3], [2, 0], [4]]
    as_they_come = Batching(batch_size=2, sort_by_length=False)
    assert list(as_they_come.batches(lengths)) == [[0, 1], [2, 3], [4]]


def test_sorting_by_length_pads_less() -> None:
    texts = ["rain", TEXTS[3], "rain", TEXTS[3]]
    padded = {}
    for is_sorted in (True, False):
        batching = Batching(batch_size=2, sort_by_length=is_sorted)
        found = encoder(prompt="plain").configured(batching=batching).encode(texts)
        padded[is_sorted] = found.trace.notes["padded_tokens"]
    assert padded[True] == sum(encoder(prompt="plain").encode(texts).token_counts)
    assert padded[False] > padded[True]


# --- what methods change ---


@pytest.mark.parametrize("prompt", ["plain", "prompteol", "cot", "knowledge", "metaeol", "echo"])
def test_a_placeholder_is_one_more_token_before_the_quotation(prompt: Any) -> None:
    made = encoder(prompt=prompt)
    plain = made.prompts(TEXTS[0])
    for without, with_it in zip(plain, made.prompts(TEXTS[0], with_placeholder=True), strict=True):
        place = with_it.placeholder
        assert place is not None
        assert with_it.ids == [*without.ids[:place], 0, *without.ids[place:]]
        behind = made.tokenizer.decode(with_it.ids[place + 1 :]).lstrip()
        assert behind.startswith(('"', "A man"))
        assert with_it.text_tokens.start == without.text_tokens.start + 1


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_the_placeholder_has_the_embedding_that_it_is_given(family: str) -> None:
    made = encoder(family)
    # A row that the model has: then the token could as well be the one of that row.
    row = made.module.get_input_embeddings().weight[7].detach()
    found = made.embed(TEXTS, placeholder=row)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        [prompt] = made.prompts(text, with_placeholder=True)
        ids = list(prompt.ids)
        assert prompt.placeholder is not None
        ids[prompt.placeholder] = 7
        assert apart(vector, states_of(family, ids)[-1][-1]) < 1e-4


def test_a_method_sees_and_changes_the_input_of_each_layer() -> None:
    made = encoder(layer=2, batch_size=2)
    seen: list[int] = []

    def halve(layer: int, states: Tensor, batch: PromptBatch) -> Tensor | None:
        seen.append(layer)
        assert states.shape[:2] == batch.ids.shape
        return states / 2 if layer == 1 else None

    found = made.embed(TEXTS[:2], before_layer=halve).vectors
    assert seen == [0, 1]
    # The layer run by itself, on half of what transformers feeds it.
    for row, text in enumerate(TEXTS[:2]):
        [prompt] = made.prompts(text)
        states = states_of("llama", prompt.ids)[1][None] / 2
        places = torch.arange(len(prompt.ids))[None]
        with torch.inference_mode():
            rotary = made.body.rotary_emb(states, position_ids=places)
            output = made.body.layers[1](states, position_embeddings=rotary)
        assert apart(found[row], output[0, -1]) < 1e-4


# --- refusals ---


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": "eol"}, "prompt must be one of plain, prompteol"),
        ({"pooling": "max"}, "pooling must be"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReadOut(**wrong)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=r"layer must lie in \[-4, 3\]"):
        encoder(layer=layer)


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="the context of 'tiny-llama' is 1024"):
        encoder(max_tokens=4000).encode([" ".join(["flute"] * 2000)])
    whole = encoder(prompt="plain", max_tokens=1024).encode([" ".join(["flute"] * 2000)])
    assert whole.token_counts == (1024,)


# --- encoders of sentence-transformers ---


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in TEXTS for word in text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *"abcdefgh.,?"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)), encoding="utf-8")
    transformers.BertTokenizer(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        attn_implementation="sdpa",
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    torch.random.set_rng_state(state)
    return folder


@pytest.fixture(scope="module")
def sentence_encoder(bert_folder: Path) -> SentenceEncoder:
    made = load_encoder(bert_folder, "tiny-bert", LoadSettings(device="cpu"), bert_folder)
    assert isinstance(made, SentenceEncoder)
    return made


def test_a_sentence_encoder_agrees_with_its_library(sentence_encoder: SentenceEncoder) -> None:
    assert isinstance(sentence_encoder, TextEncoder)
    expected = sentence_encoder.module.encode(list(TEXTS), show_progress_bar=False)
    for size in (1, 2, 5):
        made = sentence_encoder.configured(batching=Batching(batch_size=size))
        assert apart(made.encode(TEXTS).vectors, expected) < 1e-4


def test_without_modules_a_sentence_encoder_averages_its_tokens(
    sentence_encoder: SentenceEncoder, bert_folder: Path
) -> None:
    bert = transformers.BertModel.from_pretrained(bert_folder).eval()
    hub = transformers.AutoTokenizer.from_pretrained(bert_folder)
    found = sentence_encoder.encode(TEXTS)
    for text, vector, count in zip(TEXTS, found.vectors, found.token_counts, strict=True):
        inputs = hub(text, return_tensors="pt")
        with torch.inference_mode():
            states = bert(**inputs).last_hidden_state[0]
        assert apart(vector, states.mean(0)) < 1e-4
        assert count == len(states)


def test_a_sentence_encoder_reads_no_more_tokens_than_it_is_told(
    sentence_encoder: SentenceEncoder,
) -> None:
    long = " ".join(["rain"] * 60)
    assert sentence_encoder.encode([long]).token_counts == (40,)
    short = sentence_encoder.configured(max_tokens=6)
    found = short.encode([long, "rain rain rain rain"])
    assert found.token_counts == (6, 6)
    assert apart(found.vectors[0], found.vectors[1]) < 1e-4
    assert short.facts.max_tokens == 6
    assert sentence_encoder.configured(max_tokens=1000).max_tokens == 40
    assert sentence_encoder.module.max_seq_length == 40


def test_work_of_a_sentence_encoder_is_counted(sentence_encoder: SentenceEncoder) -> None:
    found = sentence_encoder.encode(TEXTS[1:2])
    [tokens] = found.token_counts
    layer = 4 * 32 * 32 + 2 * 32 * 48
    assert sentence_encoder.facts.matrix_parameters == 2 * layer
    assert sentence_encoder.facts.weight_bytes == 4 * 2 * layer
    attention = 2 * 4 * 32 * tokens * tokens
    assert found.trace.flops == pytest.approx(2 * 2 * layer * tokens + attention)
    assert list(found.trace.marks) == ["tokenized", "encoded"]
    # A batch is no wider than the longest of its texts.
    alone = sentence_encoder.configured(batching=Batching(batch_size=1)).encode(TEXTS)
    assert alone.trace.notes == {"layers": 2, "padded_tokens": sum(alone.token_counts)}


def test_a_sentence_encoder_is_loaded_as_asked(bert_folder: Path) -> None:
    asked = LoadSettings(device="cpu", dtype="bfloat16", attention="eager")
    made: Any = load_encoder(bert_folder, "tiny-bert", asked, bert_folder)
    assert made.facts.dtype == "bfloat16"
    assert made.facts.weight_bytes == 2 * made.facts.matrix_parameters
    assert made.module[0].model.config._attn_implementation == "eager"


def test_no_texts_are_no_vectors_for_a_sentence_encoder(sentence_encoder: SentenceEncoder) -> None:
    assert sentence_encoder.encode([]).vectors.shape == (0, 32)


def test_a_causal_language_model_is_loaded_as_a_prompted_encoder(tmp_path: Path) -> None:
    module("llama").save_pretrained(tmp_path)
    tokenizer().hub.save_pretrained(tmp_path)
    made = load_encoder(tmp_path, "mine", LoadSettings(device="cpu"), tmp_path)
    assert isinstance(made, CausalEncoder)
    assert apart(made.encode(TEXTS).vectors, encoder().encode(TEXTS).vectors) < 1e-5


def test_a_pickled_module_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense/pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="is pickled and not loaded"):
        load_encoder(tmp_path, "mine", LoadSettings(device="cpu"), tmp_path)


def test_a_tokenizer_without_places_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(Unsupported, match="does not say where its tokens stand"):
        CausalEncoder(module("llama"), HubTokenizer(Slow()), "tiny-llama")


# --- real models ---


def spearman(name: Any, vectors: Any) -> float:
    data = load_mini(name)
    counts = np.ones((1, len(data.units())))
    return float(100 * data.numbers(vectors, counts)["cosine_spearman"][0])


def embedded(model: Any, name: Any) -> dict[int, Any]:
    """Return the vectors of each unit, every text embedded once."""
    units = load_mini(name).units()
    texts = list(dict.fromkeys(text for unit in units for text in unit))
    rows = dict(zip(texts, model.encode(texts).vectors.astype(np.float64), strict=True))
    return {place: np.stack([rows[text] for text in unit]) for place, unit in enumerate(units)}


@pytest.mark.weights
def test_minilm_reaches_its_known_number_on_lee() -> None:
    model: Any = load("minilm-l6", offline=True, capability="TextEncoder")
    vectors = embedded(model.configured(max_tokens=128), "lee")
    assert spearman("lee", vectors) == pytest.approx(50.45, abs=0.2)
    pearson = load_mini("lee").numbers(vectors, np.ones((1, 50)))["cosine_pearson"][0]
    assert pearson == pytest.approx(0.6538, abs=0.002)


class _Spliced(CausalEncoder):
    """Ids of the prompt's two halves around the ids of the text, as the card's figures were made.

    The paper's code, and so ours, tokenises the whole prompt, where a full stop and the quotation
    mark behind it become one token.
    """

    def _prompt(self, template: str, text: str, *, with_placeholder: bool) -> Any:
        before, after = template.replace("{placeholder}", "").split("{text}")
        ids = [self.tokenizer.encode(part) for part in (before, cleaned(text), after)]
        kept = ids[1][: self.read_out.max_tokens]
        from models.encoders import Prompt

        return Prompt([*ids[0], *kept, *ids[2]], range(len(ids[0]), len(ids[0]) + len(kept)))

    def _cut(self, text: str) -> str:
        return text


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "prompt", "layer", "ours", "card"),
    [
        ("lee", "prompteol", 30, 45.6, 43.4),
        ("lee", "knowledge", 30, 48.9, 48.1),
        ("wordsim", "prompteol", 28, 49.7, 49.9),
        ("wordsim", "prompteol", 30, 37.5, 37.3),
    ],
)
def test_smollm2_reaches_its_known_numbers(
    name: Any, prompt: Any, layer: int, ours: float, card: float
) -> None:
    model: Any = load("smollm2-135m", offline=True, capability="TextEncoder")
    read_out = ReadOut(prompt=prompt, layer=layer)
    found = spearman(name, embedded(model.configured(read_out=read_out), name))
    assert found == pytest.approx(ours, abs=0.3)
    spliced = _Spliced(model.module, model.tokenizer, model.name, read_out=read_out)
    assert spearman(name, embedded(spliced, name)) == pytest.approx(card, abs=0.5)


def test_the_scorer_of_these_numbers_is_scipys() -> None:
    data: Any = load_mini("lee")
    vectors = np.random.default_rng(0).standard_normal((50, 8))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = data.pairs()
    expected = stats.spearmanr((unit @ unit.T)[first, second], data.gold[first, second])
    found = spearman("lee", {place: vectors[place : place + 1] for place in range(50)})
    assert found == pytest.approx(100 * expected.statistic)
