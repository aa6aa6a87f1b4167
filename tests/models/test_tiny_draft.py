"""The data and the loss of the recipe of `tiny-draft`."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from models.embedded.tiny_draft import data
from models.embedded.tiny_draft.train import (
    CANDIDATES,
    ENDS,
    PROMPT_WEIGHT,
    SIZES,
    Continuation,
    DistillationLoss,
    Recipe,
    Teacher,
    Texts,
    chain,
    initial_embedding,
    quality_of,
    texts_of,
    windows_of,
)
from tasks.code_scoring import WARMUP
from tasks.humaneval import HumanEval
from tasks.humaneval_mini import HumanEvalMini
from tests.models.tiny import tiny_module


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    # Words, not numbers: `1, 2, 3, 4, 5, 6, 7, 8` belongs to nobody.
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[place : place + length]) for place in range(len(words) - length + 1)}


def function_names(text: str) -> set[str]:
    return set(re.findall(r"\bdef (\w+)", text))


@pytest.fixture(scope="module")
def sides() -> dict[bool, list[data.Prompt]]:
    """The recipe's prompts: for training, and held out."""
    sizes = SIZES["cuda"]
    return {
        held_out: [
            prompt
            for kind in ("code", "chat")
            for prompt in data.prompts(kind, counts[kind], held_out=held_out, seed=0)
        ]
        for held_out, counts in (
            (False, {"code": sizes.code, "chat": sizes.chat}),
            (True, {"code": sizes.held_out_code, "chat": sizes.held_out_chat}),
        )
    }


@pytest.fixture(scope="module")
def all_prompts(sides: dict[bool, list[data.Prompt]]) -> list[data.Prompt]:
    return sides[False] + sides[True]


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    found = [item.fields for task in (HumanEval(), HumanEvalMini()) for item in task.problems()]
    assert len(found) == 164 + 48
    return found


def test_no_prompt_asks_for_a_function_of_humaneval_or_its_miniature(
    all_prompts: list[data.Prompt], problems: list[dict[str, Any]]
) -> None:
    names = {problem["entry_point"] for problem in problems}
    assert names == set(data.EXCLUDED_NAMES)
    for prompt in all_prompts:
        assert not function_names(prompt.text) & names, prompt.text


def test_no_prompt_shares_eight_words_in_a_row_with_a_problem(
    all_prompts: list[data.Prompt], problems: list[dict[str, Any]]
) -> None:
    taken = set().union(*(word_runs(problem["prompt"], 8) for problem in problems))
    assert len(all_prompts) > 6000
    for prompt in all_prompts:
        assert not word_runs(prompt.text, 8) & taken, prompt.text


def test_the_overlap_test_would_see_a_problem_among_the_prompts(
    problems: list[dict[str, Any]],
) -> None:
    taken = set().union(*(word_runs(problem["prompt"], 8) for problem in problems[:1]))
    assert word_runs("# Task\n" + problems[0]["prompt"].upper(), 8) & taken


def test_held_out_prompts_share_no_key_and_no_text_with_the_others(
    sides: dict[bool, list[data.Prompt]],
) -> None:
    keys = {side: {prompt.key for prompt in chosen} for side, chosen in sides.items()}
    texts = {side: {prompt.text for prompt in chosen} for side, chosen in sides.items()}
    assert len(keys[True]) > 50
    assert not keys[True] & keys[False]
    assert not texts[True] & texts[False]


def test_prompts_are_distinct_and_the_same_for_the_same_seed() -> None:
    first = data.prompts("code", 300, held_out=False, seed=3)
    assert first == data.prompts("code", 300, held_out=False, seed=3)
    assert first != data.prompts("code", 300, held_out=False, seed=4)
    assert len({prompt.text for prompt in first}) == len(first) == 300


def test_computed_examples_are_what_the_sentence_says() -> None:
    texts = [prompt.text for prompt in data.prompts("code", 2000, held_out=False, seed=0)]
    found = [
        re.search(r"number_of_ending_in_(\d)\([^)]*\).*?>>> \w+\((.*?)\)\n\s+(\d+)", text, re.S)
        for text in texts
    ]
    examples = [match.groups() for match in found if match]
    assert examples
    for digit, numbers, answer in examples:
        values = [int(value) for value in numbers.strip("[]").split(", ")]
        assert sum(abs(value) % 10 == int(digit) for value in values) == int(answer)


def test_stubs_of_the_library_are_python_once_they_have_a_body() -> None:
    stubs = data.library_stubs()
    assert len(stubs) > 1000
    for stub in stubs[:200]:
        # A docstring alone is a body.
        compile(stub.text, "stub", "exec")
        assert stub.text.rstrip().endswith(('"""', "'''"))


def test_library_windows_cover_each_file_once_and_in_order() -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [list(text.encode()[:1000]) for text in texts]

    windows = list(data.library_windows(encode, 400, 30, 0))
    assert len(windows) == 30
    assert all(100 <= len(window) <= 400 for window in windows)
    assert windows == list(data.library_windows(encode, 400, 30, 0))
    files = {path.read_bytes()[:400] for path in data.library_files()}
    assert bytes(windows[0]) in files


def test_test_files_and_installed_packages_are_not_among_the_library_files() -> None:
    for path in data.library_files():
        assert not {"test", "tests", "site-packages"} & set(path.parts)


def test_warmup_functions_of_the_harness_are_not_trained_on(
    all_prompts: list[data.Prompt],
) -> None:
    names = {problem.entry_point for problem in WARMUP}
    assert not any(function_names(prompt.text) & names for prompt in all_prompts)


@settings(max_examples=30, deadline=None)
@given(
    positions=st.integers(1, 9),
    chunk=st.integers(1, 10),
    some_columns=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_loss_and_its_gradients_are_those_of_autograd(
    positions: int, chunk: int, some_columns: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, embedding = draw(positions, 4).requires_grad_(), draw(11, 4).requires_grad_()
    columns = torch.randperm(11, generator=generator)[:7] if some_columns else None
    correction = draw(7) if some_columns else None
    width = 7 if some_columns else 11
    candidates = torch.stack(
        [torch.randperm(width, generator=generator)[:3] for _ in range(positions)]
    )
    targets = draw(positions, 3).softmax(-1)
    weights = torch.rand(positions, generator=generator) + 0.1
    loss, agreement = DistillationLoss.apply(
        hidden, embedding, candidates, targets, weights, chunk, columns, correction
    )
    (3 * loss).backward()
    found = hidden.grad, embedding.grad

    wide_hidden = hidden.detach().double().requires_grad_()
    wide_embedding = embedding.detach().double().requires_grad_()
    whole = torch.zeros(positions, width, dtype=torch.float64)
    whole.scatter_(1, candidates, targets.double())
    logits = wide_hidden @ wide_embedding.T
    if columns is not None and correction is not None:
        logits = logits[:, columns] + correction
    entropy = F.cross_entropy(logits, whole, reduction="none")
    expected = (entropy * weights).sum() / weights.sum()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for value, gradient in zip(found, (wide_hidden.grad, wide_embedding.grad), strict=True):
        torch.testing.assert_close(value.double(), gradient, atol=1e-5, rtol=1e-4)
    share = ((logits.argmax(-1) == candidates[:, 0]) * weights).sum() / weights.sum()
    torch.testing.assert_close(agreement, share.float())


def test_the_drawn_tokens_stand_for_all_that_are_left_out() -> None:
    recipe: Any = object.__new__(Recipe)
    recipe.device = torch.device("cpu")
    recipe.generator = torch.Generator().manual_seed(0)
    recipe.frequent = torch.tensor([0, 3])
    recipe.sizes = SIZES["cpu"]._replace(drawn=6)
    candidates = torch.tensor([[5, 3], [17, 5]])
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    sums = []
    for _ in range(3000):
        columns, correction, places = recipe.take_part(candidates, 40)
        assert columns.unique().numel() == len(columns) == 4 + 6
        assert {0, 3, 5, 17} <= set(columns.tolist())
        assert (columns[places] == candidates).all()
        assert (correction[torch.isin(columns, torch.tensor([0, 3, 5, 17]))] == 0).all()
        sums.append((logits[columns] + correction).exp().sum())
    # The softmax's normaliser is estimated without bias.
    mean, spread = torch.stack(sums).mean(), torch.stack(sums).std() / 3000**0.5
    assert abs(mean - logits.exp().sum()) < 4 * spread


def test_a_full_rank_initial_embedding_gives_the_teachers_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(40, 6, generator=generator)
    states = torch.randn(500, 6, generator=generator) * torch.tensor([3.0, 1, 1, 0.5, 0.2, 2])
    frequencies = torch.arange(40)
    for rank in (6, 5, 2):
        embedding = initial_embedding(head, states, frequencies, rank)
        # The best hidden states for these rows, by least squares on centred logits.
        logits = states @ head.T
        weights = frequencies / frequencies.sum() + 1 / 40
        weights = weights / weights.sum()
        centred = logits - logits @ weights[:, None]
        root = weights.sqrt()
        hidden = torch.linalg.lstsq(embedding * root[:, None], (centred * root).T).solution.T
        error = ((hidden @ embedding.T - centred) * root).square().sum()
        singular = torch.linalg.svdvals((centred * root).double())
        torch.testing.assert_close(
            error.double(), singular[rank:].square().sum(), atol=1e-2, rtol=1e-3
        )
        # The scale that RMSNorm gives a hidden state.
        torch.testing.assert_close(hidden.square().mean(0), torch.ones(rank), atol=2e-2, rtol=2e-2)


@settings(max_examples=60, deadline=None)
@given(right=st.lists(st.booleans(), max_size=40), drafts=st.integers(1, 6))
def test_a_chain_accepts_what_token_by_token_verification_would(
    right: list[bool], drafts: int
) -> None:
    accepted, verifications = chain(right, drafts)
    place = expected = steps = 0
    while place < len(right):
        steps += 1
        for _ in range(drafts):
            if place == len(right) or not right[place]:
                break
            expected += 1
            place += 1
        place += 1  # the target's own token
    assert (accepted, verifications) == (expected, steps)


def tiny_teacher(module: Any) -> Teacher:
    teacher = object.__new__(Teacher)
    teacher.device = torch.device("cpu")
    teacher.module = module
    teacher.head = module.lm_head.weight.detach()
    return teacher


def test_left_padded_greedy_continuations_are_those_of_one_prompt_alone() -> None:
    teacher = tiny_teacher(tiny_module("llama"))
    given = [[5, 9, 31], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
    generator = torch.Generator().manual_seed(0)
    together = teacher.continue_(given, torch.zeros(3), 7, generator)
    for tokens, written in zip(given, together, strict=True):
        ids = list(tokens)
        for token in written.written:
            with torch.no_grad():
                assert teacher.module(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        assert not set(ENDS) & set(written.written[:-1])
        with torch.no_grad():
            shares = teacher.module(torch.tensor([ids[:-1]])).logits[0].softmax(-1)
        best = shares.topk(CANDIDATES, dim=-1)
        torch.testing.assert_close(written.shares, best.values, atol=1e-5, rtol=1e-4)
        assert (written.candidates[:, 0] == best.indices[:, 0]).all()
        at_candidates = shares.gather(1, written.candidates.long())
        torch.testing.assert_close(at_candidates, written.shares, atol=1e-5, rtol=1e-4)


def test_sampled_continuations_follow_the_teachers_distribution() -> None:
    module = tiny_module("llama")
    teacher = tiny_teacher(module)
    generator = torch.Generator().manual_seed(0)
    count, temperature = 4000, 6.0
    written = teacher.continue_([[5, 9]] * count, torch.full((count,), temperature), 1, generator)
    with torch.no_grad():
        expected = (module(torch.tensor([[5, 9]])).logits[0, -1] / temperature).softmax(-1)
    found = np.bincount([row.written[0] for row in written], minlength=97)
    statistic = ((found - count * expected.numpy()) ** 2 / (count * expected.numpy())).sum()
    assert statistic < 160  # chi-square on 96 degrees of freedom: p of about 5e-5


def continuation(written: list[int], tokens: int) -> Continuation:
    """A continuation whose candidates at place p begin with 100 p."""
    candidates = torch.arange(tokens).int()[:, None] * 100 + torch.arange(CANDIDATES).int()
    shares = torch.full((tokens, CANDIDATES), 1 / CANDIDATES)
    return Continuation(written, candidates, shares, torch.zeros(len(written), 4))


def test_only_real_tokens_count_and_prompts_count_less() -> None:
    rows = [
        ([4, 5, 6], continuation([7, 8], 4)),
        ([9], continuation([10, 11, 12, 13, 14, 15], 6)),  # one token more than fits
    ]
    texts = texts_of(rows, 6)
    assert texts.ids.tolist() == [[4, 5, 6, 7, 8, 0], [9, 10, 11, 12, 13, 14]]
    low = PROMPT_WEIGHT
    expected = torch.tensor([[low, low, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    torch.testing.assert_close(texts.weights, expected)
    assert texts.candidates[0, :, 0].tolist() == [0, 100, 200, 300, 0, 0]
    assert texts.candidates[1, :, 1].tolist() == [1, 101, 201, 301, 401, 0]


def test_a_windows_only_candidate_is_the_token_that_follows() -> None:
    texts = windows_of([[3, 4, 5, 6], [7, 8]], 4)
    assert texts.weights.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert texts.candidates[0, :3, 0].tolist() == [4, 5, 6]
    assert texts.candidates[1, 0, 0] == 8
    assert (texts.shares == 1).all()


def test_a_student_that_is_the_teacher_has_full_marks() -> None:
    module = tiny_module("llama")
    teacher = tiny_teacher(module)
    generator = torch.Generator().manual_seed(0)
    given = [[5, 9, 31], [7, 8, 9]]
    written = teacher.continue_(given, torch.zeros(2), 12, generator)
    texts = texts_of(list(zip(given, written, strict=True)), 15)
    quality = quality_of(module, texts)
    assert quality["agreement"] == 1.0
    # What the teacher's candidates weigh: the rest is not looked at.
    counted = texts.weights == 1.0
    covered = float((texts.shares.sum(-1) * counted).sum() / counted.sum())
    assert quality["acceptance"] == pytest.approx(covered, abs=1e-5)
    # Every token is foreseen: 4 drafts and 1 of the target's own, time and again.
    counts = [chain([True] * len(row.written), 4) for row in written]
    assert quality["accepted_drafts"] == sum(a for a, _ in counts) / sum(v for _, v in counts)


def test_acceptance_is_one_minus_total_variation() -> None:
    shares = torch.tensor([[[0.7, 0.2, 0.1], [0.8, 0.1, 0.1]]])
    candidates = torch.tensor([[[0, 1, 2], [2, 0, 1]]]).int()
    drafted = torch.log(torch.tensor([[[0.5, 0.4, 0.1], [0.8, 0.1, 0.1]]]))
    texts = Texts(torch.tensor([[1, 0]]), torch.tensor([[1.0, 1.0]]), candidates, shares)

    class Student:
        model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))

        def __call__(self, **_: Any) -> Any:
            return SimpleNamespace(logits=drafted)

    quality = quality_of(Student(), texts)
    assert quality["acceptance"] == pytest.approx((0.8 + 0.3) / 2)
    assert quality["agreement"] == 0.5
