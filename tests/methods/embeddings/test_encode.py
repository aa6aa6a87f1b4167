"""The encoder as it is, and Echo: what they yield, what they cost, what they refuse."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from hardware.profile import Profile
from methods.embeddings.echo import Echo
from methods.embeddings.encode import Encode
from models.base import EncoderFacts, Encoding, TextEncoder, Trace, Unsupported
from models.encoders import CausalEncoder, ReadOut, SentenceEncoder
from models.tokenization import HubTokenizer
from runner.registry import Registry
from tests.models.tiny import ARCHITECTURES

PROFILE = Profile(name="tests", kind="cpu", label="No particular device")
TEXTS = ("a cat sat", "dogs bark at the moon?", 'he said "no" to it, twice', "x")


@functools.cache
def encoder() -> CausalEncoder:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        tokenizer_models.BPE(vocab={each: row for row, each in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    class_name, sizes = ARCHITECTURES["llama"]
    model_class = getattr(transformers, class_name)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = model_class.config_class(
        **{**sizes, "vocab_size": 256, "max_position_embeddings": 999}
    )
    module = model_class(config)
    torch.random.set_rng_state(state)
    hub = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    return CausalEncoder(module, HubTokenizer(hub), "tiny")


class Stranger:
    """A text encoder of somebody else's."""

    name = "stranger"
    facts = EncoderFacts(
        dimension=1,
        num_layers=0,
        max_tokens=1,
        matrix_parameters=0,
        weight_bytes=0,
        dtype="float32",
    )

    def encode(self, texts: Any) -> Encoding:
        return Encoding(np.zeros((len(texts), 1), np.float32), (1,) * len(texts), Trace())

    def synchronize(self) -> None:
        """Nothing is running."""


def applied(method: Any, model: TextEncoder | None = None) -> Encoding:
    with method.apply(model or encoder(), PROFILE) as changed:
        found: Encoding = changed.encode(TEXTS)
        return found


def test_by_default_a_causal_model_is_asked_for_one_word_and_read_at_its_end() -> None:
    read_out = ReadOut(prompt="prompteol", layer=3, pooling="last")
    expected = encoder().configured(read_out=read_out).encode(TEXTS)
    assert np.array_equal(applied(Encode()).vectors, expected.vectors)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "plain"},
        {"prompt": "plain", "pooling": "mean"},
        {"prompt": "knowledge", "layer": 2},
        {"prompt": "metaeol"},
    ],
)
def test_settings_are_the_read_out(settings: dict[str, Any]) -> None:
    read_out = ReadOut(**{"pooling": "last", **settings})
    expected = encoder().configured(read_out=read_out).encode(TEXTS)
    found = applied(Encode(**settings))
    assert np.array_equal(found.vectors, expected.vectors)
    assert not np.allclose(found.vectors, applied(Encode()).vectors)


def test_batches_change_the_work_and_not_the_vectors() -> None:
    apart = applied(Encode(batch_size=1))
    together = applied(Encode(batch_size=4, sort_by_length=False))
    assert np.abs(apart.vectors - together.vectors).max() < 1e-4 * np.abs(apart.vectors).max()
    assert apart.trace.notes["padded_tokens"] == sum(apart.token_counts)
    assert int(together.trace.notes["padded_tokens"]) > sum(apart.token_counts)


def test_the_model_is_left_as_it_was() -> None:
    before = encoder().read_out, encoder().encode(TEXTS).vectors
    applied(Encode(prompt="plain", layer=1))
    applied(Echo())
    assert encoder().read_out is before[0]
    assert np.array_equal(encoder().encode(TEXTS).vectors, before[1])


def test_echo_says_the_text_twice_and_reads_the_second_time() -> None:
    expected = encoder().configured(read_out=ReadOut(prompt="echo", pooling="mean")).encode(TEXTS)
    found = applied(Echo())
    assert np.array_equal(found.vectors, expected.vectors)
    once = applied(Encode(prompt="plain", pooling="mean"))
    wording = len("Rewrite the sentence: , rewritten sentence: ")
    assert found.token_counts == tuple(2 * count + wording for count in once.token_counts)
    assert found.trace.flops > 2 * once.trace.flops


def test_the_second_time_sees_the_whole_text_and_the_first_does_not() -> None:
    def first_token(text: str) -> tuple[Any, Any]:
        model = encoder().configured(read_out=ReadOut(prompt="echo", pooling="mean"))
        [prompt] = model.prompts(text)
        with torch.inference_mode():
            states = model.body(input_ids=torch.tensor([prompt.ids])).last_hidden_state[0]
        start = len("Rewrite the sentence: ")
        return states[start], states[prompt.text_tokens.start]

    one, other = first_token("a cat"), first_token("a dog")
    assert torch.allclose(one[0], other[0], atol=1e-5)
    assert not torch.allclose(one[1], other[1], atol=1e-3)


def test_a_sentence_encoder_pools_in_its_own_way() -> None:
    made = SentenceEncoder.__new__(SentenceEncoder)
    made.name, made.facts = "sentences", Stranger.facts
    for settings in ({"prompt": "plain"}, {"layer": 2}, {"pooling": "mean"}):
        with pytest.raises(Unsupported, match="'sentences' has a pooling of its own"):
            applied(Encode(**settings), made)  # type: ignore[arg-type]  # settings of several types


def test_an_unknown_encoder_is_taken_as_it_is() -> None:
    assert applied(Encode(), Stranger()).vectors.shape == (4, 1)
    with pytest.raises(Unsupported, match="pooling of its own"):
        applied(Encode(prompt="plain"), Stranger())
    with pytest.raises(Unsupported, match="'echo' needs a causal language model"):
        applied(Echo(), Stranger())


@pytest.mark.parametrize("method", [Encode(layer=9), Echo(layer=9)])
def test_a_layer_that_the_model_lacks_is_refused(method: Any) -> None:
    with pytest.raises(Unsupported, match=r"cannot read 'tiny': layer must lie in \[-4, 3\]"):
        applied(method)


@pytest.mark.parametrize("method", [Encode(), Echo()])
def test_what_is_no_encoder_is_refused(method: Any) -> None:
    with pytest.raises(Unsupported):
        applied(method, object())  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize(
    ("make", "wrong", "words"),
    [
        (Encode, {"prompt": "eol"}, "prompt must be one of auto, plain"),
        (Encode, {"pooling": "max"}, "pooling must be one of auto, last, mean"),
        (Encode, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        (Encode, {"max_tokens": True}, "max_tokens must be a whole number"),
        (Echo, {"pooling": "max"}, "pooling must be 'last' or 'mean'"),
        (Echo, {"max_tokens": 0}, "max_tokens must be at least 1"),
        (Echo, {"layer": "last"}, "layer must be a whole number"),
    ],
)
def test_settings_are_checked(make: Any, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**wrong)


@pytest.mark.parametrize(("name", "role"), [("encode", "baseline"), ("echo", "method")])
def test_they_are_found_by_their_files(name: str, role: str) -> None:
    assert Registry().load_method(name).role == role
