"""Run the targets of ``tests/fuzz`` on random input, without a fuzzer."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import SYSTEM_TOPICS, TARGETS, feed

CORPUS = Path(__file__).parent / "fuzz" / "corpus"

SEEDS = {name: sorted(set(target.seeds())) for name, target in TARGETS.items()}

FIELDS = ["req", "status", "message", "key", "channel", "banned", "name", "id", "links", "time"]
FIELDS += ["event", "who", "username", "messages", "payload"]


def corpus_inputs(name: str) -> list[Path]:
    """Return the inputs that once broke a target, or that a fuzzer selected."""
    return sorted(CORPUS.joinpath(name).iterdir())


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """Draw a valid input with pieces changed, removed, repeated or moved."""
    data = bytearray(draw(st.sampled_from(SEEDS[name])))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 40)))
        piece = bytes(data[start:stop])
        match draw(st.sampled_from(["change", "remove", "repeat", "move", "truncate"])):
            case "change":
                data[start:stop] = draw(st.binary(max_size=8))
            case "remove":
                del data[start:stop]
            case "repeat":
                data[stop:stop] = piece
            case "move":
                del data[start:stop]
                place = draw(st.integers(0, len(data)))
                data[place:place] = piece
            case "truncate":
                del data[stop:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_target_accepts_corpus(name: str) -> None:
    inputs = corpus_inputs(name)
    assert inputs
    for path in inputs:
        TARGETS[name].check(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_target_accepts_valid_input(name: str) -> None:
    for seed in SEEDS[name]:
        TARGETS[name].check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_target_accepts_mutated_input(name: str) -> None:
    @given(mutated(name))
    def check(data: bytes) -> None:
        TARGETS[name].check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_target_accepts_any_bytes(name: str) -> None:
    @given(st.binary(max_size=300))
    def check(data: bytes) -> None:
        TARGETS[name].check(data)

    check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=30)  # drawing an example is slow
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SYSTEM_TOPICS) - 1),
            st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6),
            st.integers(0, 10),
        ),
        max_size=6,
    )
)
def test_answers_target_accepts_any_json(replies: list[tuple[int, dict[str, object], int]]) -> None:
    lines = (
        bytes((where,)) + json.dumps({"req": req, **answer}).encode()
        for where, answer, req in replies
    )
    TARGETS["answers"].check(b"\n".join(lines))


@given(mutated("codec"), st.lists(st.integers(0, 2000), max_size=30))
def test_codec_result_does_not_depend_on_chunks(data: bytes, cuts: list[int]) -> None:
    head, wire = data[0] if data else 0, data[1:]
    places = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    pieces = [wire[a:b] for a, b in pairwise(places)]
    assert feed(head, pieces) == feed(head, [wire])
