"""Files of the hub: what is asked for, and that a failure is one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tasks.hub import hub_file


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_file_of_a_data_set_is_asked_for_and_offline_only_where_it_is(
    offline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(*names: str, **how: Any) -> str:
        asked.append((*names, how))
        return "found/here"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert hub_file("owner/set", "data/a.jsonl", "abc") == Path("found/here")
    how = {"repo_type": "dataset", "revision": "abc", "local_files_only": offline == "1"}
    assert asked == [("owner/set", "data/a.jsonl", how)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("nobody answers\nat host such and such"), "nobody answers"),
        (ValueError("no such revision"), "no such revision"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_failure_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*names: str, **how: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match=rf"^{said}\Z"):
        hub_file("owner/set", "data/a.jsonl", "main")


def test_without_the_hubs_client_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match="huggingface_hub is not installed"):
        hub_file("owner/set", "data/a.jsonl", "main")
