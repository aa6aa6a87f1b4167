"""AdaDec: its choices against brute force and a version without cache, its cost, its control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hardware.profile import Profile
from methods.base import Method
from methods.decoding.adadec import AdaDec
from methods.decoding.adadec_random_pause import AdadecRandomPause
from methods.decoding.common_loops import (
    Branch,
    BranchEnd,
    branches_topology,
    leaves_function_body,
    never_ends,
)
from methods.decoding.common_thresholds import entropy, fallback_threshold, learned_threshold
from models.base import Decoding, Generation, Session, TextGenerator
from models.draft_tree import DraftTree
from models.native.build import compiler
from models.text import CausalLM
from tests.models.tiny import tiny_model
from tests.models.toy import TableModel, TableSession, random_table

CPU = Profile(name="test", kind="cpu", label="test")
MODELS = [("llama", "transformers"), ("qwen2", "transformers")] + [
    ("llama", "native") for _ in range(bool(compiler()))
]
PROMPTS = [[(7 * n + 3 * at * at) % 96 + 1 for at in range(1 + n % 9)] for n in range(50)]


class PatientSession(TableSession):
    """Forgets a tree that another follows, as caches of real models do."""

    def verify(self, tree: DraftTree) -> torch.Tensor:
        self._waiting = None
        return super().verify(tree)


class PatientTable(TableModel):
    def session(self, capacity: int) -> TableSession:
        self.sessions.append(PatientSession(self, capacity))
        return self.sessions[-1]


def generate(
    method: Method[Any], model: TextGenerator, prompt: Sequence[int], length: int, **options: Any
) -> Generation:
    with method.apply(model, CPU) as changed:
        return changed.generate(prompt, Decoding(max_new_tokens=length, **options))


def always(**options: Any) -> AdaDec:
    return AdaDec(tau=0.0, **options)


# --- where nothing may change ---------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "kernels"), MODELS)
@pytest.mark.parametrize(
    "method",
    [AdaDec(tau=math.inf), always(candidates=1), always(length=0), always(length=0, candidates=9)],
    ids=["never", "one-candidate", "no-length", "no-length-9"],
)
def test_without_a_choice_the_text_is_greedy(
    architecture: str, kernels: Any, method: AdaDec
) -> None:
    model = tiny_model(architecture, kernels=kernels)
    for prompt in PROMPTS[:6]:
        plain = model.generate(prompt, Decoding(max_new_tokens=20))
        found = generate(method, model, prompt, 20)
        assert (found.token_ids, found.finish) == (plain.token_ids, plain.finish)
        assert found.trace.notes["pauses"] == (
            0 if math.isinf(method.tau) else len(plain.token_ids)
        )


# --- brute force ----------------------------------------------------------------------------------


def brute_force(
    model: TableModel, prompt: Sequence[int], length: int, method: AdaDec, tau: float
) -> tuple[list[int], list[int]]:
    """Decode a table; return the tokens and, of the winners, how many tokens their branches had."""
    text, sizes = list(prompt), []
    while len(text) < len(prompt) + length:
        logits = model.logits_after(text).double()
        scores = torch.log_softmax(logits, -1)
        if -float((scores.exp() * scores).sum()) < tau:
            text.append(int(logits.argmax()))
        else:
            ranked = []
            for token in sorted(range(len(scores)), key=lambda t: (-float(scores[t]), t)):
                branch, total = [token], float(scores[token])
                while len(branch) <= method.length and branch[-1] not in model.facts.eos_ids:
                    ahead = torch.log_softmax(model.logits_after([*text, *branch]).double(), -1)
                    branch.append(int(ahead.argmax()))
                    total += float(ahead.max())
                ranked.append((total / len(branch), branch))
            best = max(ranked[: method.candidates], key=lambda entry: entry[0])[1]
            text.append(best[0])
            sizes.append(len(best))
        if text[-1] in model.facts.eos_ids:
            break
    return text[len(prompt) :], sizes


@pytest.mark.parametrize("tau", [0.0, 1.1])
@pytest.mark.parametrize("reuse", [True, False])
def test_choices_are_those_of_brute_force_on_a_table(reuse: bool, tau: float) -> None:
    sizes, changes, pauses = set(), 0, 0
    for seed in range(30):
        table = random_table(4, seed=seed)
        table[:, 3] += 0.7  # the end of the text is never far
        model = PatientTable(table, eos_ids=frozenset({3}))
        method = AdaDec(tau=tau, length=3, reuse=reuse)
        expected, found_sizes = brute_force(model, [0], 8, method, tau)
        found = generate(method, model, [0], 8)
        assert list(found.token_ids) == expected
        assert found.trace.notes["pauses"] == len(found_sizes)
        sizes |= set(found_sizes)
        changes += int(found.trace.notes["changes"])
        pauses += len(found_sizes)
    assert changes > 5
    assert sizes == {1, 2, 3, 4}  # ended at once, after one or two tokens, and not
    assert pauses > 30


def test_a_branch_that_ends_early_is_divided_by_its_own_length() -> None:
    branch = Branch(7, -1.0)
    branch.tokens.append(3)
    branch.score += -0.5
    assert branch.normalised == pytest.approx(-0.75)

    # After 0: 1 (p .5) goes on at p .6 a token; 2 (p .45) ends at once with p .9. Divided by their
    # own lengths, (ln .45 + ln .9) / 2 = -.45 beats (ln .5 + 5 ln .6) / 6 = -.54; divided by
    # 6 both, -.15 would win by far, and so would the ended branch of a candidate that is much
    # worse: 3 (p .05) must lose with -1.55, though -3.10 / 6 = -.52 would beat -.54.
    p = torch.full((6, 6), 1e-9)
    p[0, [1, 2, 3]] = torch.tensor([0.5, 0.45, 0.05])
    p[1, [1, 4]] = torch.tensor([0.6, 0.4])
    p[2, [5, 4]] = torch.tensor([0.9, 0.1])
    p[3, [5, 4]] = torch.tensor([0.9, 0.1])
    assert generate(always(), PatientTable(p.log(), eos_ids=frozenset({5})), [0], 1).token_ids == (
        2,
    )
    p[0, [1, 2, 3]] = torch.tensor([0.95, 1e-9, 0.05])
    assert generate(always(), PatientTable(p.log(), eos_ids=frozenset({5})), [0], 1).token_ids == (
        1,
    )


# --- against a version without a cache ------------------------------------------------------------


def slow_text(model: CausalLM, prompt: Sequence[int], length: int, method: AdaDec) -> list[int]:
    """Decode with a whole forward for every single token; nothing is kept."""

    def after(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model.module(torch.tensor([list(ids)])).logits[0, -1].float()

    text = list(prompt)
    while len(text) < len(prompt) + length and text[-1] != 0:
        logits = after(text)
        if float(entropy(logits)) < float(method.tau):
            text.append(int(logits.argmax()))
            continue
        scores = torch.log_softmax(logits, -1)
        best: tuple[float, int] = (-math.inf, -1)
        for token in scores.topk(method.candidates).indices.tolist():
            branch, total = [token], float(scores[token])
            while len(branch) <= method.length and branch[-1] != 0:
                ahead = torch.log_softmax(after([*text, *branch]), -1)
                branch.append(int(ahead.argmax()))
                total += float(ahead.max())
            best = max(best, (total / len(branch), token), key=lambda entry: entry[0])
        text.append(best[1])
    return text[len(prompt) :]


@pytest.mark.parametrize(("architecture", "kernels"), MODELS)
def test_texts_are_those_of_a_version_without_cache(architecture: str, kernels: Any) -> None:
    model = tiny_model(architecture, kernels=kernels)
    method = AdaDec(tau=2.5, length=2)
    changed = reused = 0
    prompts = PROMPTS if kernels == "native" or not compiler() else PROMPTS[:15]
    for number, prompt in enumerate(prompts):
        found = generate(replace(method, reuse=number % 2 == 0), model, prompt, 5)
        assert list(found.token_ids) == slow_text(model, prompt, 5, method), prompt
        changed += int(found.trace.notes["changes"])
        reused += int(found.trace.notes["reused"])
        assert 0 < found.trace.notes["pauses"] <= found.trace.notes["positions"]
    assert changed > 5
    assert reused > 5


class WatchedSession:
    """A session that checks that nothing but a commit changes what is cached."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.length, self.capacity = session.length, session.capacity
        self.checks = 0
        self._last: Any = None

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> torch.Tensor:
        logits = self._session.prefill(token_ids, all_logits=all_logits)
        return self._keep(logits)

    def verify(self, tree: DraftTree) -> torch.Tensor:
        logits = self._session.verify(tree)
        for found, before in zip(self._session.cached(), self._last, strict=True):
            assert torch.equal(found, before)
            self.checks += 1
        return logits

    def commit(self, path: Sequence[int]) -> None:
        before = self._last
        self._session.commit(path)
        for found, kept in zip(self._session.cached(), before, strict=True):
            assert torch.equal(found[:, :, : self.length], kept)
        self._keep(None)

    def _keep(self, logits: Any) -> Any:
        self.length = self._session.length
        self._last = [states.clone() for states in self._session.cached()]
        return logits


@pytest.mark.parametrize(("architecture", "kernels"), MODELS)
@pytest.mark.parametrize("reuse", [True, False])
def test_looking_ahead_leaves_the_cache_as_it_was(
    architecture: str, kernels: Any, reuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, kernels=kernels)
    opened: list[WatchedSession] = []
    session = model.session
    monkeypatch.setattr(
        model,
        "session",
        lambda capacity: opened.append(WatchedSession(session(capacity))) or opened[-1],
    )
    prompt = PROMPTS[8]
    found = generate(AdaDec(tau=2.0, reuse=reuse), model, prompt, 20, ignore_eos=True)
    assert opened[0].checks > 20
    fresh: Session = session(60)
    fresh.prefill([*prompt, *found.token_ids][: opened[0].length])
    assert len(prompt) < opened[0].length < len(prompt) + 20
    for one, other in zip(opened[0]._session.cached(), fresh.cached(), strict=True):  # type: ignore[attr-defined]
        assert (one - other).abs().max() < 1e-4


# --- what it costs --------------------------------------------------------------------------------


def test_forwards_are_tokens_and_lookaheads() -> None:
    model = tiny_model("llama")
    for prompt in PROMPTS[3:9]:
        found = generate(AdaDec(tau=2.0, reuse=False), model, prompt, 10)
        trace = found.trace
        notes = trace.notes
        assert notes["positions"] == len(found.token_ids)
        assert len(trace.forwards) == len(found.token_ids) - 1 + int(notes["forwards"])
        emitted = [1 + accepted for accepted in trace.accepted]
        assert set(emitted) <= {0, 1}
        assert emitted.count(0) == notes["forwards"]
        assert 1 + sum(emitted) == len(found.token_ids)
        widths = [forward.width for forward in trace.forwards]
        assert len(trace.forwards) + notes["read_again"] <= sum(widths)


def test_a_pause_reads_its_branches_level_by_level() -> None:
    model = tiny_model("llama")
    found = generate(always(reuse=False), model, PROMPTS[8], 3, ignore_eos=True)
    widths = [forward.width for forward in found.trace.forwards]
    # Behind the prompt there is no root to branch from: the three candidates go one by one.
    first = [width for width in range(1, 6) for _ in range(3)]
    assert widths == [*first, 1, 4, 7, 10, 13, 16, 1, 4, 7, 10, 13, 16]
    assert found.trace.notes["read_again"] == 3 * (0 + 1 + 2 + 3 + 4) + 2 * (1 + 4 + 7 + 10 + 13)


def test_reuse_saves_forwards_and_changes_no_token() -> None:
    model = tiny_model("llama")
    saved = 0
    for prompt in PROMPTS[4:9]:
        for tau in (0.0, 2.5):
            once, again = (
                generate(AdaDec(tau=tau, reuse=reuse), model, prompt, 10) for reuse in (True, False)
            )
            assert once.token_ids == again.token_ids
            for name in ("pauses", "changes", "forwards", "positions"):
                assert once.trace.notes[name] == again.trace.notes[name]
            fewer = len(again.trace.forwards) - len(once.trace.forwards)
            assert fewer == once.trace.notes["reused"]
            assert again.trace.notes["reused"] == 0
            assert 1 + sum(1 + accepted for accepted in once.trace.accepted) == len(once.token_ids)
            assert once.trace.flops <= again.trace.flops
            saved += fewer
    assert saved > 20


def test_at_the_end_of_the_context_branches_are_as_short_as_they_must_be() -> None:
    # The session of a table refuses nodes past the last position.
    for length in (1, 2, 9):
        model = PatientTable(random_table(6, seed=3), max_positions=3 + length)
        found = generate(always(), model, [1, 2, 3], length)
        assert len(found.token_ids) == length


# --- where branches end ---------------------------------------------------------------------------


class Characters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


@pytest.mark.parametrize(
    ("prompt", "output", "branch", "has_left"),
    [
        ('"""', "\n    return x", "\ny", True),
        ('"""', "\n    return x", "\n", False),
        ('"""', "\n    return x", "\n    y", False),
        ('"""', "\n\treturn x\n", "\ty = 1\n\n", False),
        ('"""', "\n    x\n", "\n\n", False),
        ('"""', "\n    x\n", "\n\n\n", True),
        ('"""', "\n    x\n", "\n  \n \n", True),
        # The first piece goes on with the prompt's last line, unless that one has ended.
        ("return ", "", "x + 1", False),
        ("return ", "x", " + 1", False),
        ("return ", "x", "\n\n\n", False),
        ("def f():\n", "", "    x", False),
        ("def f():\n", "", "x", True),
        # A text that is no function body from the start, or has left it, is not judged.
        ("Hi.\n", "Sure, ", "here", False),
        ('"""', "\n    return x\nprint", "(1)\n", False),
    ],
)
def test_a_branch_ends_where_it_leaves_the_function(
    prompt: str, output: str, branch: str, has_left: bool
) -> None:
    tokenizer = Characters()
    end = BranchEnd(tokenizer, *map(tokenizer.encode, (prompt, output, branch)))
    assert leaves_function_body(end) is has_left
    assert never_ends(end) is False


def test_branches_stop_at_the_rule_and_at_the_end_of_text() -> None:
    # Ids are characters: 0 is a line break, so a line that begins with 1 leaves the body.
    class Lines(Characters):
        def decode(self, token_ids: Sequence[int]) -> str:
            return "".join("\n ab"[token] for token in token_ids)

    table = torch.zeros(4, 4)
    table[3, 0] = table[2, 0] = 9  # a letter is followed by a line break
    table[0, 2] = 9  # which is followed by a letter
    model = PatientTable(table)
    model.tokenizer = Lines()  # type: ignore[assignment]  # another tokenizer
    widths = {}
    for rule in ("function-body", "never"):
        method = always(candidates=1, length=5, branch_end=rule, reuse=False)
        found = generate(method, model, [3, 0, 1, 3], 2)
        widths[rule] = [forward.width for forward in found.trace.forwards]
        assert found.token_ids == (0, 2)
    # Of the first pause, each branch by itself: line break, then a letter that leaves the body.
    assert widths["function-body"][0] == 1
    assert len(widths["function-body"]) == 1 + 1 + 1
    assert len(widths["never"]) == 5 + 1 + 5


@pytest.mark.parametrize(("count", "depth"), [(1, 1), (3, 1), (3, 4), (2, 5)])
def test_branches_stand_side_by_side_under_the_root(count: int, depth: int) -> None:
    topology = branches_topology(count, depth)
    assert len(topology) == 1 + count * depth
    assert len(topology.children[0]) == count
    assert topology.max_depth == depth
    for branch in range(count):
        end = depth * (branch + 1)
        seen = topology.ancestors[end].nonzero()[0].tolist()
        assert seen == [0, *range(end - depth + 1, end + 1)]


# --- thresholds, sampling, control ----------------------------------------------------------------


def test_the_threshold_is_the_models_own_or_the_median_of_the_published() -> None:
    model = TableModel(random_table(5))
    assert AdaDec().threshold(model) == fallback_threshold() == 0.985
    model.name = "smollm2-135m"
    assert AdaDec().threshold(model) == learned_threshold("smollm2-135m")
    assert AdaDec(tau=1).threshold(model) == 1.0
    found = generate(AdaDec(tau=math.inf), model, [0], 5)
    assert found.trace.notes["tau"] == math.inf
    assert found.trace.notes["pause_rate"] == 0


def test_a_pause_begins_at_the_threshold_itself() -> None:
    table = torch.zeros(4, 4)  # every entropy is ln 4
    exact = float(entropy(table[0]))
    for tau, pauses in ((exact, 3), (math.nextafter(exact, 9), 0)):
        found = generate(AdaDec(tau=tau), PatientTable(table), [0], 3)
        assert found.trace.notes["pauses"] == pauses


def test_a_sampled_pause_draws_one_of_the_candidates_by_its_score() -> None:
    model = PatientTable(random_table(6, seed=2))
    heat = 0.5
    ranked = brute_scores(model, 0, 3, 2)
    weights = torch.softmax(torch.tensor(list(ranked.values())).double() / heat, 0)
    method = always(length=2)
    with method.apply(model, CPU) as changed:
        drawn = [
            changed.generate(
                [0], Decoding(max_new_tokens=1, temperature=heat, seed=seed)
            ).token_ids[0]
            for seed in range(600)
        ]
    for token, weight in zip(ranked, weights.tolist(), strict=True):
        assert drawn.count(token) / 600 == pytest.approx(weight, abs=0.06)
    assert set(drawn) == set(ranked)


def brute_scores(model: TableModel, last: int, candidates: int, length: int) -> dict[int, float]:
    first = torch.log_softmax(model.table[last], -1)
    scores = {}
    for token in first.topk(candidates).indices.tolist():
        total, end = float(first[token]), token
        for _ in range(length):
            ahead = torch.log_softmax(model.table[end], -1)
            end = int(ahead.argmax())
            total += float(ahead.max())
        scores[token] = total / (1 + length)
    return scores


def test_random_pauses_come_at_their_rate_and_differ_from_text_to_text() -> None:
    model = PatientTable(random_table(20, seed=1))
    method = AdadecRandomPause(pause_rate=0.25, length=1)
    pauses = positions = 0
    patterns = set()
    for first in range(20):
        found = generate(method, model, [first], 50)
        pauses += int(found.trace.notes["pauses"])
        positions += int(found.trace.notes["positions"])
        patterns.add(tuple(forward.width for forward in found.trace.forwards))
        again = generate(method, model, [first], 50)
        assert again.token_ids == found.token_ids
    assert positions == 1000
    assert pauses / positions == pytest.approx(0.25, abs=0.05)
    assert len(patterns) > 10


def test_a_random_pause_looks_ahead_as_adadec_does() -> None:
    model = tiny_model("llama")
    for prompt in PROMPTS[3:7]:
        expected = generate(always(), model, prompt, 12)
        found = generate(AdadecRandomPause(pause_rate=1.0), model, prompt, 12)
        assert found.token_ids == expected.token_ids
        assert found.trace.forwards == expected.trace.forwards
        plain = model.generate(prompt, Decoding(max_new_tokens=12))
        assert generate(AdadecRandomPause(pause_rate=0), model, prompt, 12).token_ids == (
            plain.token_ids
        )


@pytest.mark.parametrize("reuse", [True, False])
def test_random_positions_do_not_depend_on_reuse(reuse: bool) -> None:
    model = tiny_model("qwen2")
    method = AdadecRandomPause(pause_rate=0.4, seed=3)
    for prompt in PROMPTS[:8]:
        found = generate(replace(method, reuse=reuse), model, prompt, 20)
        assert found.token_ids == generate(method, model, prompt, 20).token_ids


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AdaDec(tau=-1), "tau must be 0 or more, or 'learned', got -1"),
        (lambda: AdaDec(tau="auto"), "tau must be 0 or more, or 'learned', got 'auto'"),  # type: ignore[arg-type]
        (lambda: AdaDec(tau=math.nan), "tau must be 0 or more"),
        (lambda: AdaDec(candidates=0), "candidates must be a whole number from 1 to 16"),
        (lambda: AdaDec(length=33), "length must be a whole number from 0 to 32"),
        (lambda: AdaDec(branch_end="line"), "branch_end must be one of function-body, never"),  # type: ignore[arg-type]
        (lambda: AdadecRandomPause(pause_rate=1.5), r"pause_rate must lie in \[0, 1\], got 1.5"),
        (lambda: AdadecRandomPause(seed=-1), "seed must be a whole number from 0"),
    ],
)
def test_wrong_settings_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()
