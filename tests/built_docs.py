"""The built pages, which the session ``docs`` looks at: ``python -m nox -s docs``."""

from __future__ import annotations

import html
import re
import zlib

import pytest

from tests.support.pages import DOCS

BUILT = DOCS / "_build" / "html"


def inventory() -> list[str]:
    """The Python names that the built reference has."""
    packed = (BUILT / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]
    lines = zlib.decompress(packed).decode().splitlines()
    return [line.split()[0] for line in lines if " py:" in line]


def test_the_reference_has_nothing_private() -> None:
    names = inventory()
    assert len(names) > 100
    assert not [name for name in names if re.search(r"(^|\.)_", name)]


def test_no_signature_shows_what_is_private() -> None:
    text = (BUILT / "reference.html").read_text()
    signatures = re.findall(r'<dt class="sig.*?</dt>', text, re.DOTALL)
    assert len(signatures) > 100
    for signature in signatures:
        words = html.unescape(re.sub(r"<[^>]+>", "", signature))
        assert not re.search(r"\b_[A-Za-z]|ForwardRef|<.* object", words), words
    # Bases, links and what stands in the texts.
    assert "emitter_anyio._" not in re.sub(r'title="[^"]*"', "", text)


@pytest.mark.parametrize("page", sorted(BUILT.glob("*.html")), ids=lambda page: page.name)
def test_a_page_needs_no_network(page: object) -> None:
    text = (BUILT / str(page)).read_text()
    loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="([^"]+)"', text)
    assert loaded
    assert not [address for address in loaded if "//" in address]
