"""The grammar of coordinate tokens: bins, answers and their parser, key points, and the mask."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.detector_format import (
    Grammar,
    GrammarMask,
    dequantise,
    fits,
    parse,
    parse_keypoints,
    quantise,
)

BINS = 50
NAME_START, NAME_END, BOX_START, BOX_END, EOS = range(256, 261)
FIRST = 261
# A tokenizer of bytes: names and None take several tokens, which is what published models have.
GRAMMAR = Grammar(
    name_start=NAME_START,
    name_end=NAME_END,
    box_start=BOX_START,
    box_end=BOX_END,
    coordinates={FIRST + number: number for number in range(BINS)},
    ends=frozenset((EOS,)),
    spell=lambda ids: bytes(each for each in ids if each < 256).decode("utf-8", "replace"),
    encode=lambda text: list(text.encode()),
)
COUNTS = {"box": 4, "point": 2, "polygon": None}
NAMES = st.sampled_from(["cat", "red star", "person on a bench", "été"])


def written(found: Sequence[tuple[str, Sequence[Sequence[int]]]], comma: str = ",") -> list[int]:
    """Return the ids of an answer."""
    ids: list[int] = []
    for number, (name, instances) in enumerate(found):
        ids += b", " if number else b""
        ids += [NAME_START, *name.encode(), NAME_END, BOX_START]
        for place, bins in enumerate(instances):
            ids += comma.encode() if place else b""
            ids += [FIRST + value for value in bins]
        ids += b"" if instances else b"None"
        ids.append(BOX_END)
    return [*ids, EOS]


def instances_of(kind: str) -> st.SearchStrategy[list[tuple[int, ...]]]:
    lengths = st.just(COUNTS[kind]) if COUNTS[kind] else st.sampled_from([6, 8, 14])
    one = lengths.flatmap(lambda n: st.tuples(*[st.integers(0, BINS - 1)] * n))
    return st.lists(one, max_size=4)


ANSWERS = st.sampled_from(sorted(COUNTS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.lists(st.tuples(NAMES, instances_of(kind)), min_size=1, max_size=4)
    )
)


@settings(max_examples=40)
@given(st.floats(-10, 700), st.floats(-10, 700), st.sampled_from([32, 128, 1000]))
def test_a_bin_loses_at_most_its_width_and_half_of_it_when_rounded(a, b, bins):
    size = 640.0
    low, high = sorted((a, b))
    for rounding, least, most in (("floor", 0.0, 1.0), ("round", -0.5, 0.5)):
        assert quantise(low, size, bins, rounding) <= quantise(high, size, bins, rounding)
        inside = min(max(a, 0.0), size)
        lost = inside - dequantise(quantise(a, size, bins, rounding), size, bins)
        width = size / (bins - 1)
        assert least * width - 1e-9 <= lost <= most * width + 1e-9


def test_the_edges_of_the_image_are_the_first_and_the_last_bin():
    assert [quantise(value, 96) for value in (-3, 0, 96, 200)] == [0, 0, 999, 999]
    assert (dequantise(0, 96), dequantise(999, 96)) == (0.0, 96.0)
    # A third of the image is a bin's own position, not a little less.
    assert quantise(32, 96) == 333


@settings(max_examples=40)
@given(ANSWERS)
def test_an_answer_survives_writing_and_reading(content):
    kind, found = content
    ids = written(found)
    parsed = parse(ids, GRAMMAR, COUNTS[kind])
    assert parsed.complete
    assert parsed.errors == []
    told = [(name, [piece.bins for piece in pieces]) for name, pieces in parsed.found]
    assert told == [(name, list(instances)) for name, instances in found]
    for _, pieces in parsed.found:
        for bins, first, end in pieces:
            assert [each - FIRST for each in ids[first:end]] == list(bins)


def test_the_length_of_an_answer_is_that_of_its_parts():
    boxes = [("cat", [(1, 2, 3, 4), (5, 6, 7, 8)]), ("dog", [])]
    # Markers 4 a name, a comma and a space between names, 4 a box and a comma between, the end.
    assert len(written(boxes)) == 2 * (4 + 3) + 2 + (4 + 1 + 4) + len("None") + 1


@settings(max_examples=30, deadline=None)
@given(ANSWERS, st.integers(0, 10**6))
def test_an_answer_cut_anywhere_keeps_what_was_whole_and_says_that_it_has_no_end(content, cut):
    kind, found = content
    ids = written(found)
    ids = ids[: cut % len(ids)]
    parsed = parse(ids, GRAMMAR, COUNTS[kind])
    assert not parsed.complete
    for (name, pieces), (asked, instances) in zip(parsed.found, found, strict=False):
        assert name == asked
        told = [piece.bins for piece in pieces]
        # A polygon may be cut to one with fewer corners.
        whole = told[:-1] if kind == "polygon" else told
        assert whole == list(instances)[: len(whole)]
    assert len(parsed.errors) <= 1


def test_what_breaks_the_grammar_is_counted_and_the_rest_is_kept():
    ids = written([("cat", [(1, 2, 3), (5, 6, 7, 8)]), ("dog", [])])
    parsed = parse(ids, GRAMMAR, 4)
    assert [[piece.bins for piece in pieces] for _, pieces in parsed.found] == [[(5, 6, 7, 8)], []]
    assert parsed.errors == ["3 coordinates for 'cat' where 4 are wanted"]
    talk = [*b"Here you are: ", *written([("cat", [(1, 2, 3, 4)])])]
    parsed = parse(talk, GRAMMAR, 4)
    assert len(parsed.found[0].pieces) == 1
    assert parsed.errors == ["'Here you are:' stands outside of the grammar"]
    word = written([("cat", [(1, 2, 3, 4)])])
    word[word.index(FIRST + 2) : word.index(FIRST + 3)] = [FIRST + 2, *b"no"]
    assert parse(word, GRAMMAR, 4).found[0].pieces == []
    assert len(parse(word, GRAMMAR, 4).errors) == 1


def test_extra_spaces_are_no_error():
    ids = written([("cat", [(1, 2, 3, 4), (5, 6, 7, 8)])], comma=", ")
    parsed = parse(ids, GRAMMAR, 4)
    assert [piece.bins for piece in parsed.found[0].pieces] == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert parsed.errors == []
    second = parsed.found[0].pieces[1]
    assert ids[second.first] == FIRST + 5


def test_a_name_without_instances_and_a_block_without_end_are_errors():
    ids = [NAME_START, *b"cat", NAME_START, *b"dog", NAME_END, BOX_START, *range(FIRST, FIRST + 4)]
    parsed = parse([*ids, NAME_START, *b"cow", NAME_END, BOX_START, BOX_END, EOS], GRAMMAR, 4)
    assert [name for name, _ in parsed.found] == ["dog", "cow"]
    assert len(parsed.found[0].pieces) == 1
    assert len(parsed.errors) == 2


def test_a_polygon_has_three_corners_at_least():
    assert [count for count in range(10) if fits(count, None)] == [6, 8]
    assert [count for count in range(10) if fits(count, 2)] == [2]


POSE = (
    '{"person1": {"bbox": " <1><2><3><4> ", "keypoints": {"nose": " <5><6> ", "left eye": '
    '"unvisible"}}, "person2": {"bbox": " <7><8><9><10> ", "keypoints": {"nose": " <11><12> ", '
    '"left eye": " <13><14> "}}}'
)


def pose_ids(text: str) -> list[int]:
    ids: list[int] = []
    place = 0
    while place < len(text):
        if text[place] == "<":
            end = text.index(">", place)
            ids.append(FIRST + int(text[place + 1 : end]))
            place = end + 1
        else:
            ids += text[place].encode()
            place += 1
    return ids


def test_key_points_are_read_with_those_that_cannot_be_seen():
    ids = [*b"```json\n", *pose_ids(POSE), *b"\n```", EOS]
    poses = parse_keypoints(ids, GRAMMAR, ["nose", "left eye"])
    assert poses.complete
    assert poses.errors == []
    first, second = poses.found
    assert (first.name, first.box, first.points) == (
        "person1",
        (1, 2, 3, 4),
        {"nose": (5, 6), "left eye": None},
    )
    assert second.points == {"nose": (11, 12), "left eye": (13, 14)}
    assert [ids[place] - FIRST for place in second.places] == list(range(7, 15))


def test_cut_or_wrong_key_points_keep_the_things_that_are_whole():
    ids = pose_ids(POSE)
    poses = parse_keypoints(ids[: len(ids) - 12], GRAMMAR, ["nose", "left eye"])
    assert [each.name for each in poses.found] == ["person1"]
    assert not poses.complete
    assert poses.errors == ["the entry 'person2' is no JSON"]
    poses = parse_keypoints([*ids, EOS], GRAMMAR, ["nose", "tail"])
    assert poses.found[0].points == {"nose": (5, 6), "tail": None}
    assert len(poses.errors) == 2
    wrong = pose_ids(POSE.replace("<1><2><3><4>", "<1><2><3>"))
    poses = parse_keypoints([*wrong, EOS], GRAMMAR, ["nose", "left eye"])
    assert [each.name for each in poses.found] == ["person2"]
    assert poses.errors == ["the box of 'person1' has 3 coordinates"]
    assert parse_keypoints([*b"no idea", EOS], GRAMMAR, ["nose"]).errors == ["'no idea' is no JSON"]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(COUNTS)), st.integers(0, 10**6), st.integers(0, 60))
def test_whatever_is_chosen_under_the_mask_is_well_formed_and_ends_in_time(kind, seed, more):
    phrases = ["cat", "red star"]
    shortest = [[(0, 0)]] * 2 if kind == "point" else [[], []]
    least = len(written(list(zip(phrases, shortest, strict=True))))
    draw = random.Random(seed)
    mask = GrammarMask(GRAMMAR, phrases, COUNTS[kind], least + more)
    ids: list[int] = []
    while (allowed := mask.allowed()) is not None:
        # Words and markers are few among what is allowed, and where it goes wrong.
        others = sorted(token for token in allowed if token < FIRST)
        ids.append(draw.choice(others if others and draw.random() < 0.5 else sorted(allowed)))
        mask.advance(ids[-1])
    assert len(ids) <= least + more
    parsed = parse(ids, GRAMMAR, COUNTS[kind])
    assert (parsed.complete, parsed.errors) == (True, [])
    assert [name for name, _ in parsed.found] == phrases


@settings(max_examples=30)
@given(ANSWERS)
def test_the_mask_allows_every_well_formed_answer_about_what_was_asked(content):
    kind, found = content
    ids = written(found)
    mask = GrammarMask(GRAMMAR, [name for name, _ in found], COUNTS[kind], len(ids))
    for token in ids:
        allowed = mask.allowed()
        assert allowed is not None
        assert token in allowed
        mask.advance(token)
    assert mask.allowed() is None


def test_a_mask_without_room_for_any_answer_is_refused():
    least = len(written([("cat", [])]))
    GrammarMask(GRAMMAR, ["cat"], 4, least)
    with pytest.raises(ValueError, match=f"takes {least} tokens at least"):
        GrammarMask(GRAMMAR, ["cat"], 4, least - 1)


def in_digits(ids: Sequence[int]) -> list[int]:
    """Return an answer with each run of coordinate tokens as numbers in brackets."""
    digits: list[int] = []
    run: list[str] = []
    for token in [*ids, -1]:
        if token in GRAMMAR.coordinates:
            run.append(str(GRAMMAR.coordinates[token]))
            continue
        if run:
            digits += f"[{', '.join(run)}]".encode()
            run = []
        digits.append(token)
    return digits[:-1]


@settings(max_examples=60)
@given(ANSWERS, st.sampled_from([",", ", "]))
def test_an_answer_in_digits_says_what_it_says_in_coordinate_tokens(answer, comma):
    kind, found = answer
    ids = written(found, comma)
    tokens = parse(ids, GRAMMAR, COUNTS[kind])
    digits = in_digits(ids)
    read = parse(digits, GRAMMAR, COUNTS[kind], "digits")
    assert [(name, [piece.bins for piece in pieces]) for name, pieces in read.found] == [
        (name, [piece.bins for piece in pieces]) for name, pieces in tokens.found
    ]
    assert (read.errors, read.complete) == ([], True)
    for _, pieces in read.found:
        for piece in pieces:
            text = GRAMMAR.spell(digits[piece.first : piece.end])
            assert text == str(list(piece.bins))


@pytest.mark.parametrize(
    ("content", "boxes", "errors"),
    [
        (b"[1, 2, 3, 4]", [(1, 2, 3, 4)], []),
        (b"[1, 2, 3, 4], [5,6,7,8]", [(1, 2, 3, 4), (5, 6, 7, 8)], []),
        (b"[007, 2, 3, 4]", [(7, 2, 3, 4)], []),
        (b"None", [], []),
        (b"", [], []),
        (b"[1, 2, 3]", [], ["3 coordinates and '[1,2,3]' for 'cat' where 4 are wanted"]),
        (b"[1, 2, 3, 50]", [], ["4 coordinates and '[1,2,3,50]' for 'cat' where 4 are wanted"]),
        (
            b"[1, 2, 3, 4], [5, 6",
            [(1, 2, 3, 4)],
            ["0 coordinates and ',[5,6' for 'cat' where 4 are wanted"],
        ),
        (b"a [1, 2, 3, 4]", [(1, 2, 3, 4)], ["0 coordinates and 'a' for 'cat' where 4 are wanted"]),
        (b"1, 2, 3, 4", [], ["0 coordinates and '1,2,3,4' for 'cat' where 4 are wanted"]),
        (b"[-1, 2, 3, 4]", [], ["0 coordinates and '[-1,2,3,4]' for 'cat' where 4 are wanted"]),
        # Not a number to the grammar, however many digits it has.
        (
            b"[1, 2, 3, " + b"9" * 30 + b"]",
            [],
            [f"0 coordinates and '[1,2,3,{'9' * 30}' for 'cat' where 4 are wanted"],
        ),
    ],
)
def test_digits_that_are_no_box_are_named_and_skipped(content, boxes, errors):
    ids = [NAME_START, *b"cat", NAME_END, BOX_START, *content, BOX_END, EOS]
    read = parse(ids, GRAMMAR, 4, "digits")
    assert [piece.bins for piece in read.found[0].pieces] == boxes
    # A piece is shown by its first 40 characters.
    assert [error[:36] for error in read.errors] == [error[:36] for error in errors]


def test_coordinate_tokens_are_no_digits_nor_the_other_way_round():
    ids = written([("cat", [(1, 2, 3, 4)])])
    for strange, writing in ((ids, "digits"), (in_digits(ids), "tokens")):
        read = parse(strange, GRAMMAR, 4, writing)  # type: ignore[arg-type]  # one of two
        assert read.found == [("cat", [])]
        assert len(read.errors) == (1 if writing == "digits" else 4)
