"""Where an exception left a method."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from methods.checks import require_count
from runner.blame import in_a_line

PLUGIN = """
from methods.checks import require_count
def wrong():
    require_count("size", -1, 0, 4, "It is a size.")
"""


def raised(call: Callable[[], object]) -> Exception:
    """Return what a call raises, without the frame of this file: that would be a stranger's."""
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    return caught.value.with_traceback(caught.tb.tb_next)


def test_the_last_line_of_a_plugin_is_named_also_where_our_code_raised(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    namespace: dict[str, Callable[[], object]] = {}
    exec(compile(PLUGIN, path, "exec"), namespace)
    line = in_a_line(raised(namespace["wrong"]))
    assert line.startswith("ValueError: size must be a whole number from 0 to 4")
    assert line.endswith("(mine.py:4, in wrong)")


def test_a_method_of_ours_is_named_where_no_plugin_is_involved() -> None:
    line = in_a_line(raised(partial(require_count, "size", -1, 0, 4, "It is a size.")))
    assert re.search(r" \(checks\.py:\d+, in require_count\)$", line)


def test_a_library_is_nobodys_method() -> None:
    line = in_a_line(raised(partial(json.loads, "[1 2]")))
    assert line == "JSONDecodeError: Expecting ',' delimiter: line 1 column 4 (char 3)"
