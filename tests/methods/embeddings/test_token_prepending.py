"""Token Prepending against an explicit loop over the layers, and the promises of its card."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from hardware.profile import Profile
from methods.embeddings.common_placeholder import (
    ModelKind,
    default_layer,
    placeholder_row,
    with_last_token_at,
)
from methods.embeddings.placeholder_only import PlaceholderOnly
from methods.embeddings.token_prepending import TokenPrepending, default_exit
from models.base import TextEncoder, Unsupported
from models.encoders import TEMPLATES, Batching, CausalEncoder, ReadOut
from models.tokenization import HubTokenizer
from runner.conformance_base import sharpen
from runner.registry import Registry
from tasks.mteb_data import PairList
from tests.methods.embeddings import measure_prepending as measured
from tests.models.tiny import ARCHITECTURES

PROFILE = Profile(name="tests", kind="cpu", label="No particular device")
LAYERS = 6
TEXTS = ("a cat sat", "dogs bark at the moon?", 'he said "no" to it, twice', "x")
FAMILIES = ("llama", "qwen2", "gemma2", "gemma")
Splitting = Literal["apart", "space-and-quote", "colon-space-quote"]
MERGES: dict[Splitting, list[tuple[str, str]]] = {
    "apart": [("e", "n")],
    "space-and-quote": [("e", "n"), ("Ġ", '"')],
    "colon-space-quote": [("e", "n"), (":", "Ġ"), (":Ġ", '"')],
}


# --- tiny encoders --------------------------------------------------------------------------------


@functools.cache
def tokenizer(splitting: Splitting = "space-and-quote", *, bos: bool = False) -> HubTokenizer:
    """Return byte-level pair encoding with a handful of merges."""
    from transformers import PreTrainedTokenizerFast

    merges = MERGES[splitting]
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # Without the splitting into words, merges may go across a space.
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=splitting != "colon-space-quote"
    )
    fast.decoder = decoders.ByteLevel()
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    hub = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    return HubTokenizer(hub)


@functools.cache
def tiny_encoder(family: str = "llama", splitting: Splitting = "space-and-quote") -> CausalEncoder:
    """Return a random model of a family whose sentences and prompts are bytes."""
    import transformers

    class_name, sizes = ARCHITECTURES[family]
    words = tokenizer(splitting)
    changed = {"vocab_size": len(words.hub) + 3, "num_hidden_layers": LAYERS}
    # 48 has no whole root, which Gemma multiplies its embeddings with.
    changed |= {"hidden_size": 48, "max_position_embeddings": 1024}
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = model_class(model_class.config_class(**{**sizes, **changed}))
        sharpen(module, 4)
    return CausalEncoder(module, words, f"tiny-{family}")


def encode(
    method: TokenPrepending | PlaceholderOnly,
    model: CausalEncoder,
    texts: Sequence[str] = TEXTS,
    batching: Batching | None = None,
) -> np.ndarray:
    """Return the vectors of texts under a method."""
    with method.apply(model.configured(batching=batching), PROFILE) as changed:
        return changed.encode(texts).vectors


def prompt_of(
    model: CausalEncoder, text: str, prompt: str, max_tokens: int = 128
) -> tuple[list[int], int]:
    """Return the ids of a prompt, and where its placeholder stands."""
    configured = model.configured(read_out=ReadOut(prompt=prompt, max_tokens=max_tokens))
    (found,) = configured.prompts(text, with_placeholder=True)
    assert found.placeholder is not None
    return found.ids, found.placeholder


def layer_inputs(
    module: Any, ids: Sequence[int], place: int, row: Tensor, start: int, stop: int
) -> list[Tensor]:
    """Run a prompt layer by layer, as the paper has it: the oracle.

    Returns:
        The input of each layer after the overwriting, and the output after the final norm,
        (tokens, dimension) each.
    """
    body, config = module.get_decoder(), module.config
    tokens = len(ids)
    # The placeholder is one more row of the vocabulary; Gemma multiplies rows with sqrt(d).
    table = torch.cat([body.embed_tokens.weight, row[None]])
    extended = [*ids[:place], len(table) - 1, *ids[place + 1 :]]
    states = table[extended]
    if config.model_type.startswith("gemma"):
        states = states * torch.tensor(config.hidden_size**0.5)
    states = states[None]
    positions = torch.arange(tokens)[None]
    rotary = body.rotary_emb(states, positions)
    distance = positions[0, :, None] - positions[0]
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(body.layers)
    found = []
    for index, layer in enumerate(body.layers):
        if start <= index < stop:
            states = states.clone()
            states[0, place] = states[0, tokens - 1]
        found.append(states[0])
        window = config.sliding_window if kinds[index] == "sliding_attention" else tokens
        visible = (distance >= 0) & (distance < window)
        mask = torch.zeros(1, 1, tokens, tokens).masked_fill(~visible, -torch.inf)
        states = layer(
            states, attention_mask=mask, position_embeddings=rotary, position_ids=positions
        )
    return [*found, body.norm(states)[0]]


@contextmanager
def seen_by_layers(model: CausalEncoder) -> Iterator[list[Tensor]]:
    """Collect what each layer really reads, changes of a method included."""
    seen: list[Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].clone())
        )
        for layer in model.body.layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def close(found: Any, expected: Any, relative: float) -> None:
    """Compare numbers, up to a share of the largest of them."""
    found, expected = (np.asarray(each, dtype=np.float64) for each in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


# --- the algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "stop"), [(1, 4), (0, 2), (3, 99)])
@torch.no_grad()
def test_vectors_are_those_of_a_loop_over_the_layers(family: str, start: int, stop: int):
    model = tiny_encoder(family)
    row = placeholder_row(model.dimension, 7, 1.0)
    for text in TEXTS[:2]:
        ids, place = prompt_of(model, text, "prompteol")
        expected = layer_inputs(model.module, ids, place, row, start, stop)
        plain = layer_inputs(model.module, ids, place, row, 0, 0)
        for layer in (2, LAYERS - 1, LAYERS):
            method = TokenPrepending(start=start, exit=stop, layer=layer, pst_seed=7)
            (vector,) = encode(method, model, [text])
            close(vector, expected[layer][-1], 1e-6 if family == "llama" else 5e-6)
            if layer > start + 1:
                assert np.abs(vector - plain[layer][-1].numpy()).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_a_padded_batch_are_those_of_their_prompts_alone(family: str):
    model = tiny_encoder(family)
    method = TokenPrepending(prompt="knowledge", exit=4, layer=-1)
    together = encode(method, model)
    unsorted = encode(method, model, batching=Batching(batch_size=3, sort_by_length=False))
    row = placeholder_row(model.dimension, method.pst_seed, 1.0)
    for index, text in enumerate(TEXTS):
        ids, place = prompt_of(model, text, "knowledge")
        alone = layer_inputs(model.module, ids, place, row, 1, 4)[-1][-1]
        close(together[index], alone, 1e-4)
        close(unsorted[index], alone, 1e-4)
        close(together[index], encode(method, model, [text])[0], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_never_overwriting_is_a_forward_of_a_model_with_one_more_token_to_the_bit(family: str):
    model = tiny_encoder(family)
    row = placeholder_row(model.dimension, 5, 2.0)
    larger = copy.deepcopy(model.module)
    with torch.no_grad():
        table = torch.nn.Embedding.from_pretrained(
            torch.cat([model.body.embed_tokens.weight, row[None]])
        )
        larger.get_decoder().embed_tokens.weight = table.weight
    ids, place = prompt_of(model, TEXTS[0], "prompteol")
    ids[place] = len(table.weight) - 1
    states = larger(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for layer in (LAYERS - 2, LAYERS):
        shared: dict[str, Any] = {"layer": layer, "pst_seed": 5, "pst_std": 2.0}
        for method in (
            PlaceholderOnly(**shared),
            TokenPrepending(start=3, exit=3, **shared),
            TokenPrepending(start=4, exit=1, **shared),
        ):
            (vector,) = encode(method, model, TEXTS[:1])
            assert np.array_equal(vector, states[layer][0, -1].numpy()), (layer, method)


@torch.no_grad()
def test_tokens_before_the_placeholder_do_not_notice_it():
    model = tiny_encoder()
    _, place = prompt_of(model, TEXTS[1], "prompteol")
    assert place > 5
    seen = []
    for method in (TokenPrepending(exit=5, layer=-1), PlaceholderOnly(layer=-1)):
        with seen_by_layers(model) as states:
            encode(method, model, TEXTS[1:2])
        seen.append(states)
    with seen_by_layers(model) as vanilla:
        model.encode(TEXTS[1:2])
    assert len(seen[0]) == len(seen[1]) == len(vanilla) == LAYERS
    for layer, (prepended, control, plain) in enumerate(zip(*seen, vanilla, strict=True)):
        assert torch.equal(prepended[:, :place], control[:, :place])
        close(prepended[:, :place], plain[:, :place], 1e-5)
        # Behind it they do, from the layer after the first overwriting on.
        behind = (prepended[:, place + 1 :] - control[:, place + 1 :]).abs().amax()
        assert (behind > 1e-3) if layer > 1 else (behind == 0)


@torch.no_grad()
def test_the_placeholder_is_a_copy_of_the_last_token_in_the_chosen_layers_only():
    model = tiny_encoder()
    _, place = prompt_of(model, TEXTS[0], "cot")
    for start, stop in ((1, 4), (0, 3), (2, 3), (1, 99)):
        with seen_by_layers(model) as seen:
            encode(
                TokenPrepending(prompt="cot", start=start, exit=stop, layer=-1), model, TEXTS[:1]
            )
        for layer, states in enumerate(seen):
            is_copy = torch.equal(states[0, place], states[0, -1])
            assert is_copy == (start <= layer < stop), (start, stop, layer)


@pytest.mark.parametrize("prompt", ["plain", "prompteol", "cot", "knowledge", "metaeol"])
def test_exactly_one_token_is_added_to_each_prompt(prompt: str):
    model = tiny_encoder()
    plain = model.configured(read_out=ReadOut(prompt=prompt, layer=2))
    vanilla = plain.encode(TEXTS)
    prompts = len(TEMPLATES[prompt])
    for method in (
        TokenPrepending(prompt=prompt, layer=2),
        PlaceholderOnly(prompt=prompt, layer=2),
    ):
        with method.apply(model, PROFILE) as changed:
            found = changed.encode(TEXTS)
        assert changed.facts == plain.facts
        assert found.token_counts == tuple(count + prompts for count in vanilla.token_counts)
        assert [each.width for each in found.trace.prefill] == [
            each.width + 1 for each in vanilla.trace.prefill
        ]
        share = found.trace.flops / vanilla.trace.flops - 1
        tokens = sum(found.token_counts) / sum(vanilla.token_counts) - 1
        assert tokens <= share < 2.1 * tokens  # all of it linear to all of it quadratic
    for text in TEXTS:
        pairs = zip(plain.prompts(text), plain.prompts(text, with_placeholder=True), strict=True)
        for before, after in pairs:
            assert after.placeholder is not None
            assert after.ids[: after.placeholder] == before.ids[: after.placeholder]
            assert after.ids[after.placeholder + 1 :] == before.ids[after.placeholder :]


@torch.no_grad()
def test_metaeol_is_the_mean_over_its_eight_prompts():
    model = tiny_encoder()
    row = placeholder_row(model.dimension, 3407, 1.0)
    configured = model.configured(read_out=ReadOut(prompt="metaeol"))
    prompts = configured.prompts(TEXTS[0], with_placeholder=True)
    assert len(prompts) == 8
    vectors = [
        layer_inputs(model.module, each.ids, each.placeholder, row, 1, 3)[LAYERS - 1][-1]
        for each in prompts
    ]
    (found,) = encode(TokenPrepending(prompt="metaeol", exit=3), model, TEXTS[:1])
    close(found, torch.stack(vectors).mean(0), 1e-5)
    assert np.abs(found - vectors[0].numpy()).max() > 0.01


@torch.no_grad()
def test_leaving_early_gives_the_vector_of_the_whole_run():
    model = tiny_encoder("gemma2")
    ids, place = prompt_of(model, TEXTS[0], "prompteol")
    row = placeholder_row(model.dimension, 3407, 1.0)
    whole = layer_inputs(model.module, ids, place, row, 1, 3)
    for layer in range(1, LAYERS):
        with seen_by_layers(model) as seen:
            (early,) = encode(TokenPrepending(exit=3, layer=layer), model, TEXTS[:1])
        close(early, whole[layer][-1], 5e-6)
        assert len(seen) == layer  # layers behind it are not run
        (from_the_end,) = encode(
            TokenPrepending(exit=3, layer=layer - LAYERS - 1), model, TEXTS[:1]
        )
        assert np.array_equal(early, from_the_end)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 5), tokens=st.integers(1, 7))
def test_a_copy_touches_one_token_of_each_row_and_not_its_source(data, batch: int, tokens: int):
    columns = data.draw(st.lists(st.integers(0, tokens - 1), min_size=batch, max_size=batch))
    states = torch.arange(batch * tokens * 2, dtype=torch.float32).view(batch, tokens, 2)
    before = states.clone()
    found = with_last_token_at(states, torch.tensor(columns))
    assert torch.equal(states, before)
    for row in range(batch):
        for token in range(tokens):
            source = tokens - 1 if token == columns[row] else token
            assert torch.equal(found[row, token], before[row, source])


# --- the placeholder ------------------------------------------------------------------------------


def test_the_noise_is_standard_normal_and_follows_its_seed():
    state = torch.random.get_rng_state()
    row = placeholder_row(20_000, 3407, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(float(row.mean())) < 0.03
    assert abs(float(row.std()) - 1) < 0.03
    assert torch.equal(placeholder_row(20_000, 3407, 2.5), row * 2.5)
    assert not torch.equal(placeholder_row(20_000, 1, 1.0), row)


def test_seed_and_size_of_the_noise_change_the_vectors():
    model = tiny_encoder()
    base: dict[str, Any] = {"start": 1, "exit": 3, "layer": LAYERS}
    vectors = encode(TokenPrepending(**base), model)
    assert np.array_equal(vectors, encode(TokenPrepending(**base), model))
    # Layer 0 sees the noise before it is overwritten.
    for other in (TokenPrepending(pst_seed=1, **base), TokenPrepending(pst_std=0.02, **base)):
        assert np.abs(encode(other, model) - vectors).max() > 1e-4
    # Overwritten from layer 0 on, nobody sees it.
    base["start"] = 0
    vectors = encode(TokenPrepending(**base), model)
    assert np.array_equal(encode(TokenPrepending(pst_seed=1, **base), model), vectors)


@pytest.mark.parametrize("splitting", ["apart", "space-and-quote", "colon-space-quote"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_placeholder_stands_before_the_token_that_holds_the_quotation_mark(
    splitting: Splitting, bos: bool
):
    words = tokenizer(splitting, bos=bos)
    model = CausalEncoder(tiny_encoder().module, words, "tiny")
    ids, place = prompt_of(model, "a cat", "prompteol")
    pieces = words.hub.convert_ids_to_tokens(ids)
    quoting = {"apart": '"', "space-and-quote": 'Ġ"', "colon-space-quote": ':Ġ"'}[splitting]
    assert pieces[place + 1] == quoting
    assert pieces[place + 2] == "a"
    assert (pieces[0] == "<s>") == bos
    assert pieces[-2:] == [":", '"']
    # In front of a bare text it comes behind the token that begins it, if there is one.
    ids, place = prompt_of(model, "a cat", "plain")
    assert place == (1 if bos else 0)
    assert words.decode(ids[place + 1 :]) == "a cat"


@torch.no_grad()
def test_a_placeholder_may_be_the_first_token_of_all():
    model = tiny_encoder("qwen2")
    ids, place = prompt_of(model, TEXTS[0], "plain")
    assert place == 0
    row = placeholder_row(model.dimension, 3407, 1.0)
    expected = layer_inputs(model.module, ids, place, row, 1, 4)[LAYERS - 1][-1]
    method = TokenPrepending(prompt="plain", exit=4)
    close(encode(method, model)[0], expected, 1e-4)  # padded up to the placeholder
    close(encode(method, model, TEXTS[:1])[0], expected, 5e-6)


def test_a_long_text_loses_its_end_and_the_prompt_stays_whole():
    model = tiny_encoder()
    ids, place = prompt_of(model, "many words " * 50, "prompteol", max_tokens=20)
    short, same_place = prompt_of(model, "many words many word", "prompteol")
    assert (ids, place) == (short, same_place)
    long = encode(TokenPrepending(max_tokens=20), model, ["many words " * 50])
    assert np.array_equal(long, encode(TokenPrepending(), model, ["many words many word"]))


def test_half_precision_models_get_half_precision_noise():
    half = copy.deepcopy(tiny_encoder().module).to(torch.bfloat16)
    model = CausalEncoder(half, tokenizer(), "tiny-half")
    found = encode(TokenPrepending(exit=3), model)
    assert found.dtype == np.float32
    expected = encode(TokenPrepending(exit=3), tiny_encoder())
    for left, right in zip(found, expected, strict=True):
        assert left @ right > 0.9 * np.linalg.norm(left) * np.linalg.norm(right)


# --- what is left behind --------------------------------------------------------------------------


def everything(model: CausalEncoder) -> dict[str, Any]:
    """Return what a method could have changed."""
    return {
        "weights": {name: value.clone() for name, value in model.module.state_dict().items()},
        "hooks": {
            name: {key: len(hooks) for key, hooks in vars(part).items() if key.endswith("_hooks")}
            for name, part in model.module.named_modules()
        },
        "tokens": len(model.tokenizer.hub),
        "added tokens": model.tokenizer.hub.get_added_vocab(),
        "settings": (model.read_out, model.batching, model.facts),
        "configuration": model.module.config.to_dict(),
        "random state": torch.random.get_rng_state(),
        "gradients": torch.is_grad_enabled(),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name == "weights":
            assert all(torch.equal(value[key], after[name][key]) for key in value)
        elif name == "random state":
            assert torch.equal(value, after[name])
        else:
            assert value == after[name], name


class _Stop(Exception):
    pass


def fails_in_layer(model: CausalEncoder, layer: int) -> Callable[[], None]:
    """Make a layer raise; returns what makes it run again."""

    def raising(module: Any, args: Any) -> None:
        raise _Stop

    return model.body.layers[layer].mlp.register_forward_pre_hook(raising).remove


@pytest.mark.parametrize("method", [TokenPrepending(exit=4), PlaceholderOnly()])
def test_the_model_is_left_as_it_was_found(method: TokenPrepending | PlaceholderOnly):
    model = tiny_encoder()
    before = everything(model)
    plain = model.encode(TEXTS).vectors
    encode(method, model)
    assert_unchanged(before, everything(model))
    for layer in (0, 2):
        repair = fails_in_layer(model, layer)
        try:
            with pytest.raises(_Stop), method.apply(model, PROFILE) as changed:
                changed.encode(TEXTS)
        finally:
            repair()
        assert_unchanged(before, everything(model))
    with pytest.raises(_Stop), method.apply(model, PROFILE):
        raise _Stop
    assert_unchanged(before, everything(model))
    # The plain model may run inside the block, too: nothing hangs on it between calls.
    with method.apply(model, PROFILE) as changed:
        changed.encode(TEXTS[:1])
        assert np.array_equal(model.encode(TEXTS).vectors, plain)
    assert np.array_equal(model.encode(TEXTS).vectors, plain)


def test_two_applications_do_not_leak_into_each_other():
    model = tiny_encoder()
    first, second = TokenPrepending(exit=4), TokenPrepending(exit=3, pst_seed=1, prompt="cot")
    alone = [encode(method, model) for method in (first, second)]
    with first.apply(model, PROFILE) as one, second.apply(model, PROFILE) as two:
        mixed = [one.encode(TEXTS).vectors, two.encode(TEXTS).vectors, one.encode(TEXTS).vectors]
    assert np.array_equal(mixed[0], alone[0])
    assert np.array_equal(mixed[1], alone[1])
    assert np.array_equal(mixed[2], alone[0])


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "exit_layer"),
    [
        (ModelKind("llama", 32, 32_000), 7),  # Llama-2-7B
        (ModelKind("llama", 40, 32_000), 7),  # Llama-2-13B
        (ModelKind("llama", 32, 128_256), 3),  # Llama-3-8B
        (ModelKind("qwen2", 28, 152_064), 6),  # Qwen2-7B
        (ModelKind("gemma2", 42, 256_000), 6),  # Gemma2-9B
        (ModelKind("llama", 30, 49_152), 7),  # SmolLM2-135M: 7/32 of its layers
        (ModelKind("gpt2", 12, 50_257), 3),
    ],
)
def test_exit_layers_are_the_released_ones_or_their_share(kind: ModelKind, exit_layer: int):
    assert default_exit(kind) == exit_layer


def test_the_layer_that_is_read_is_the_released_one():
    llama = ModelKind("llama", 32, 32_000)
    assert default_layer(llama, "prompteol") == 27
    assert default_layer(llama, "knowledge") == -2
    assert default_layer(ModelKind("llama", 32, 128_256), "prompteol") == -2
    assert default_layer(ModelKind("llama", 30, 49_152), "prompteol") == -2


def test_what_auto_meant_is_noted_and_always_overwrites_something():
    model = tiny_encoder()
    for method, noted in (
        (TokenPrepending(), (1, 2)),  # 7/32 of six layers is one, which would be none
        (TokenPrepending(start=3), (3, 4)),
        (TokenPrepending(start=3, exit=2), (3, 2)),
    ):
        with method.apply(model, PROFILE) as changed:
            notes = changed.encode(TEXTS[:1]).trace.notes
        assert (notes["start"], notes["exit"], notes["layers"]) == (*noted, LAYERS - 1)
    auto = encode(TokenPrepending(), model)
    assert np.array_equal(auto, encode(TokenPrepending(exit=2, layer=LAYERS - 1), model))
    assert np.abs(auto - encode(PlaceholderOnly(), model)).max() > 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": -1}, "start must be a whole number of at least 0, got -1"),
        ({"start": True}, "start must be a whole number of at least 0, got True"),
        ({"exit": 2.5}, "exit must be a whole number of at least 0, got 2.5"),
        ({"exit": -1}, "exit must be a whole number of at least 0"),
        ({"layer": "last"}, "layer must be a whole number, got 'last'"),
        ({"prompt": "echo"}, "prompt must be one of plain, prompteol, cot, knowledge, metaeol"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"pst_std": 0.0}, "pst_std must be above 0"),
        ({"pst_std": float("nan")}, "pst_std must be above 0"),
        ({"pst_seed": -1}, "pst_seed must be a whole number of at least 0"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TokenPrepending(**wrong)


def test_models_without_a_prompt_or_the_layer_are_refused_with_the_reason():
    class Other:
        name = "other"

    with (
        pytest.raises(Unsupported, match=r"needs a causal language model .* 'other' is a Other"),
        TokenPrepending().apply(Other(), PROFILE),  # type: ignore[arg-type]  # on purpose
    ):
        pass
    with (
        pytest.raises(Unsupported, match=r"'placeholder-only' cannot read .* \[-7, 6\]"),
        PlaceholderOnly(layer=7).apply(tiny_encoder(), PROFILE),
    ):
        pass


@pytest.mark.parametrize("name", ["token-prepending", "placeholder-only"])
def test_the_registry_finds_it_with_its_card(name: str):
    method = Registry().load_method(name)()
    assert method.capability == "TextEncoder"
    assert method.role == ("method" if name == "token-prepending" else "control")
    with method.apply(tiny_encoder(), PROFILE) as changed:
        assert isinstance(changed, TextEncoder)


# --- how the gain is measured ---------------------------------------------------------------------


def test_rank_correlation_with_ties_is_that_done_by_hand():
    # Ranks 1, 2.5, 2.5, 4, 5.5, 5.5 and 2, 1, 3.5, 3.5, 5, 6; from their mean 3.5 away:
    # -2.5, -1, -1, 0.5, 2, 2 and -1.5, -2.5, 0, 0, 1.5, 2.5.
    # Products: 3.75 + 2.5 + 0 + 0 + 3 + 5 = 14.25; squares: 16.5 and 17.
    cosines = np.array([0.1, 0.2, 0.2, 0.3, 0.9, 0.9])
    pairs = [(f"a{number}", f"b{number}") for number in range(6)]
    data = PairList(pairs=tuple(pairs), gold=(0.2, 0.1, 0.5, 0.5, 0.6, 0.7))
    texts = [text for pair in pairs for text in pair]
    vectors = np.zeros((12, 2), dtype=np.float32)
    vectors[::2, 0] = 2
    vectors[1::2, 0], vectors[1::2, 1] = cosines, (1 - cosines**2) ** 0.5
    found = measured.correlations(data, texts, vectors, np.ones((1, 6)))
    assert found == pytest.approx([100 * 14.25 / (16.5 * 17) ** 0.5])


def test_gains_are_paired_and_taken_over_the_mean_of_the_seeds():
    # On every resample the second kind is two points above the first, whatever both are.
    random = np.random.default_rng(0)
    plain = random.normal(50, 10, 201)
    scores = {measured.Setting(None): plain}
    for exit_, gain in ((0, 2.0), (4, 1.0)):
        for seed, offset in enumerate((-0.5, 0.0, 0.5)):
            scores[measured.Setting(exit_, seed)] = plain + gain + offset
    lines = measured.table(scores)
    first = plain[0]
    assert lines[2] == f"| no placeholder | {first:.1f} [{first:.1f}, {first:.1f}] |  |  |"
    assert lines[3].endswith("| +2.0 [+2.0, +2.0] |  |")
    assert lines[4].startswith(f"| prepending, exit 4 | {first + 1:.1f} [{first + 0.5:.1f},")
    assert lines[4].endswith("| +1.0 [+1.0, +1.0] | -1.0 [-1.0, -1.0] |")


def test_resamples_draw_as_many_units_as_there_are_after_all_of_them_once():
    counts = measured.bootstrap_counts(7, resamples=50)
    assert counts.shape == (51, 7)
    assert (counts[0] == 1).all()
    assert (counts.sum(1) == 7).all()
    assert len({tuple(row) for row in counts.tolist()}) > 40


@torch.no_grad()
def test_the_measured_embeddings_are_those_of_the_methods():
    model = tiny_encoder()
    texts = ["a cat sat", "the dog barks at the moon", "no"]
    layers = (LAYERS - 1, LAYERS)
    for exit_ in (None, 0, 3):
        found, tokens = measured.embeddings(model, texts, "cot", measured.Setting(exit_, 5), layers)
        for place, layer in enumerate(layers):
            if exit_ is None:
                plain = model.configured(read_out=ReadOut(prompt="cot", layer=layer))
                expected = plain.encode(texts)
                assert sum(expected.token_counts) == tokens
                close(found[place], expected.vectors, 1e-5)
                continue
            method = TokenPrepending(prompt="cot", exit=exit_, layer=layer, pst_seed=5)
            close(found[place], encode(method, model, texts), 1e-5)
