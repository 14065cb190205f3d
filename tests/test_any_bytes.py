"""Any bytes, to whatever takes bytes from others: the targets of ``tests/fuzz``, unguided."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import ASKED, TARGETS, feed

CORPUS = Path(__file__).parent / "fuzz" / "corpus"

SEEDS = {name: sorted(set(target.seeds())) for name, target in TARGETS.items()}

FIELDS = ["req", "status", "message", "key", "channel", "banned", "name", "id", "links", "time"]
FIELDS += ["event", "who", "username", "messages", "payload"]


def kept(name: str) -> list[Path]:
    """The inputs that once broke a target, or that a fuzzer found worth keeping."""
    return sorted(CORPUS.joinpath(name).iterdir())


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """Something valid, with pieces of it changed, left out, said twice, or said elsewhere."""
    data = bytearray(draw(st.sampled_from(SEEDS[name])))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 40)))
        piece = bytes(data[start:stop])
        match draw(st.sampled_from(["change", "leave out", "repeat", "move", "cut off"])):
            case "change":
                data[start:stop] = draw(st.binary(max_size=8))
            case "leave out":
                del data[start:stop]
            case "repeat":
                data[stop:stop] = piece
            case "move":
                del data[start:stop]
                place = draw(st.integers(0, len(data)))
                data[place:place] = piece
            case "cut off":
                del data[stop:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_once_stays_mended(name: str) -> None:
    inputs = kept(name)
    assert inputs
    for path in inputs:
        TARGETS[name].check(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid(name: str) -> None:
    for seed in SEEDS[name]:
        TARGETS[name].check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_valid(name: str) -> None:
    @given(mutated(name))
    def check(data: bytes) -> None:
        TARGETS[name].check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
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


@settings(max_examples=30)  # it takes long to make them up
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(ASKED) - 1),
            st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6),
            st.integers(0, 10),
        ),
        max_size=6,
    )
)
def test_any_json(said: list[tuple[int, dict[str, object], int]]) -> None:
    lines = (
        bytes((where,)) + json.dumps({"req": req, **answer}).encode() for where, answer, req in said
    )
    TARGETS["answers"].check(b"\n".join(lines))


@given(mutated("codec"), st.lists(st.integers(0, 2000), max_size=30))
def test_a_conversation_cut_anywhere(data: bytes, cuts: list[int]) -> None:
    head, wire = data[0] if data else 0, data[1:]
    places = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    pieces = [wire[a:b] for a, b in pairwise(places)]
    assert feed(head, pieces) == feed(head, [wire])
