"""Low-rank changes that make tiny-detector write digits: exact, and taken back to the bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.detector_format import parse
from models.embedded.coordinate_digits import adapter, train
from models.embedded.coordinate_digits.adapter import adapted, changes, load_changes
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_detector import data
from models.embedded.tiny_detector.evaluate import requests
from models.embedded.tiny_detector.text import COORDINATES, GRAMMAR, VOCABULARY_SIZE
from models.embedded.tiny_vlm.evaluate import prompt_start
from models.embedded.tiny_vlm.network import TinyVlm
from models.embedded.training import save_half


def model() -> TinyVlm:
    torch.manual_seed(5)
    return TinyVlm(VOCABULARY_SIZE)


@cache
def changed() -> tuple[TinyVlm, dict[str, Tensor]]:
    """Return a network with changes that do something, and the changes."""
    found = model()
    adapter.adapt(found, 4, train.TOKENS)
    torch.manual_seed(6)
    for weight in found.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.05)
    return found, changes(found)


@cache
def batch() -> train.Batch:
    return train.batch_of(model(), Renderer(data.SIZE, "cpu"), 0, 1, 0)


@torch.no_grad()
def loss(network: TinyVlm) -> float:
    return float(train.loss_of(network, prompt_start(torch.device("cpu")), batch()))


def test_the_answers_to_requests_survive_being_written_in_digits() -> None:
    for request in requests("test", 20, "box", all_shapes=False):
        ids = train.encode_digits(request.answer)
        assert {*ids} <= {*train.TOKENS} | {
            token for phrase in request.phrases for token in train.encode(phrase)
        }
        read = parse(ids, GRAMMAR, COORDINATES["box"], "digits")
        assert (read.errors, read.complete) == ([], True)
        told = [(name, [piece.bins for piece in pieces]) for name, pieces in read.found]
        assert told == [(phrase, sorted(boxes)) for phrase, boxes in request.answer]


def test_fresh_changes_change_nothing_and_only_they_learn() -> None:
    network = model()
    before = loss(network)
    adapter.adapt(network, 4, train.TOKENS)
    assert loss(network) == before
    value = train.loss_of(network, prompt_start(torch.device("cpu")), batch())
    value.backward()  # type: ignore[no-untyped-call]  # torch's own
    learning = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert learning
    assert all(name.endswith((".up", ".down", ".rows")) for name in learning)
    assert not any("vision_tower" in name or "projector" in name for name in learning)


def test_a_model_with_loaded_changes_is_the_one_that_was_trained(tmp_path: Any) -> None:
    trained, found = changed()
    plain = model()
    kept = {name: value.clone() for name, value in plain.state_dict().items()}
    places = {name: weight.data_ptr() for name, weight in plain.named_parameters()}
    before = loss(plain)
    with adapted(plain, found):
        assert loss(plain) == pytest.approx(loss(trained), rel=1e-5)
        assert abs(loss(plain) - before) > 0.01
    assert loss(plain) == before
    with pytest.raises(KeyError), adapted(plain, found):
        raise KeyError
    assert {name: weight.data_ptr() for name, weight in plain.named_parameters()} == places
    for name, value in plain.state_dict().items():
        assert torch.equal(value, kept[name]), name
    save_half(found, tmp_path / "changes.safetensors")
    with adapted(plain, load_changes(tmp_path / "changes.safetensors")):
        assert loss(plain) == pytest.approx(loss(trained), rel=1e-2)


def test_changes_that_do_not_fit_are_refused_and_leave_no_trace() -> None:
    _, found = changed()
    plain = model()
    before = loss(plain)
    name = next(name for name in found if name.endswith(":up"))
    cut = {**found, name: found[name][:-1]}
    with pytest.raises(ValueError, match="is \\(160, 160\\)"), adapted(plain, cut):
        pass
    strange = {**found, "lm_tail.weight:up": found[name], "lm_tail.weight:down": found[name]}
    with pytest.raises(ValueError, match=r"no weight 'lm_tail\.weight'"), adapted(plain, strange):
        pass
    assert loss(plain) == before


def test_a_file_of_something_else_is_refused(tmp_path: Any) -> None:
    save_half({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no changes of weights"):
        load_changes(tmp_path / "weights.safetensors")
