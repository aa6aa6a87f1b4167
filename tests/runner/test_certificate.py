"""The certificate of sampled texts: exact samplers pass, biased ones do not.

Greedy certificates are tested where whole runs are, in test_resume.py and test_faults.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hardware.profile import Profile
from methods.decoding.prompt_lookup import PromptLookup
from models.base import Decoding
from runner.certificate import DISTRIBUTION_LEVEL, Centred, centred, distribution_test
from tests.models.toy import TableModel, random_table

MODEL = TableModel(random_table(5, seed=3))
PROFILE = Profile(name="cpu", kind="cpu", label="CPU")
TEMPERATURE = 0.8
STOP = ("4 1",)
Sampler = Callable[[list[int], Decoding], list[int]]


def texts(sampler: Sampler, first_seed: int, items: int = 60) -> list[Centred]:
    found = []
    for item in range(items):
        prompt = [item % 5, item % 3]
        decoding = Decoding(
            max_new_tokens=20, temperature=TEMPERATURE, seed=first_seed + item, stop=STOP
        )
        found.append(centred(MODEL, prompt, sampler(prompt, decoding), TEMPERATURE))
    return found


def plain(prompt: list[int], decoding: Decoding) -> list[int]:
    return list(MODEL.generate(prompt, decoding).token_ids)


def drafted(prompt: list[int], decoding: Decoding) -> list[int]:
    with PromptLookup(num_tokens=4).apply(MODEL, PROFILE) as model:
        return list(model.generate(prompt, decoding).token_ids)


def colder(prompt: list[int], decoding: Decoding) -> list[int]:
    changed = Decoding(
        max_new_tokens=20, temperature=0.5 * TEMPERATURE, seed=decoding.seed, stop=STOP
    )
    return plain(prompt, changed)


def never_the_likeliest(prompt: list[int], decoding: Decoding) -> list[int]:
    """As surprising as it should be now and then, but the first choice is always avoided."""
    draw = np.random.default_rng(decoding.seed)
    text: list[int] = []
    for _ in range(20):
        law = torch.softmax(MODEL.logits_after([*prompt, *text]) / TEMPERATURE, dim=-1).numpy()
        second = int(np.argsort(law)[-2])
        text.append(int(draw.choice(5, p=law / law.sum())) if draw.random() < 0.5 else second)
    return text


@pytest.mark.parametrize("sampler", [plain, drafted])
def test_an_exact_sampler_passes(sampler: Sampler) -> None:
    test = distribution_test(texts(plain, 0), texts(sampler, 10_000), seed=0)
    assert test["items"] == 60
    assert test["p"] > 0.01


@pytest.mark.parametrize("sampler", [colder, never_the_likeliest])
def test_a_biased_sampler_is_found(sampler: Sampler) -> None:
    test = distribution_test(texts(plain, 0), texts(sampler, 10_000), seed=0)
    assert test["p"] < DISTRIBUTION_LEVEL


def test_the_centred_sums_are_what_they_say() -> None:
    """By hand, from the table: surprise less entropy, hits less the best probability."""
    output = [2, 0, 4]
    surprise = likeliest = 0.0
    text = [1, 3]
    for token in output:
        law = torch.softmax(MODEL.logits_after(text).double() / TEMPERATURE, dim=-1)
        surprise += float(-law[token].log() + (law * law.log()).sum())
        likeliest += float(law.argmax() == token) - float(law.max())
        text.append(token)
    found = centred(MODEL, [1, 3], output, TEMPERATURE)
    assert found.surprise == pytest.approx(surprise, abs=1e-5)
    assert found.likeliest == pytest.approx(likeliest, abs=1e-5)
    assert centred(MODEL, [1, 3], [], TEMPERATURE) == (0.0, 0.0)


def test_the_centred_sums_of_exact_texts_are_zero_on_average() -> None:
    unstopped = [
        centred(
            MODEL,
            [item % 5],
            list(
                MODEL.generate(
                    [item % 5],
                    Decoding(max_new_tokens=20, temperature=TEMPERATURE, seed=item),
                ).token_ids
            ),
            TEMPERATURE,
        )
        for item in range(300)
    ]
    for column in np.asarray(unstopped).T:
        assert abs(column.mean()) < 4 * column.std() / np.sqrt(len(column))


def test_identical_texts_are_no_evidence() -> None:
    same = texts(plain, 0, items=12)
    assert distribution_test(same, same, seed=0)["p"] == 1.0


def test_few_items_can_never_fail() -> None:
    """Eight sign flips reach 2 / 2^8 at best; the level is below."""
    few = distribution_test(texts(plain, 0, items=8), texts(colder, 10_000, items=8), seed=0)
    assert few["p"] >= DISTRIBUTION_LEVEL
