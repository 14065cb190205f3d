"""
Draw the diagrams of the pages: ``python docs/pictures/diagrams.py``.

They are part of the pages themselves, so that they take the colours of the theme, light or dark.
Seen alone, they fall back on the colour of the text.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent

ACCENT = "var(--color-brand-primary, #0a6ebd)"
PALE = "var(--color-background-secondary, none)"
WRONG = "var(--color-problematic, #b30000)"


class Picture:
    """What is drawn, piece by piece."""

    def __init__(self, width: int, title: str) -> None:
        self.width = width
        self.height = 0
        self.title = title
        self.pieces: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, style: str = "", anchor: str = "middle"
    ) -> None:
        self.pieces.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" style="{style}">'
            f"{escape(words)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, *lines: str, stroke: str = ""
    ) -> None:
        stroke = stroke or "currentColor"
        self.pieces.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'style="fill: {PALE}; stroke: {stroke}"/>'
        )
        top = y + height / 2 - 10 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            small = "font-size: 12px; opacity: 0.8" if number else "font-weight: 600"
            self.text(x + width / 2, top + 20 * number, line, style=small)

    def line(self, x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 4" opacity="0.5"' if dashed else ""
        self.pieces.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="currentColor"{dash}/>'
        )

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, label: str = "", colour: str = ACCENT
    ) -> None:
        way = 1 if x2 > x1 else -1
        self.pieces.append(
            f'<path d="M{x1:g} {y1:g} L{x2 - 7 * way:g} {y2:g}" '
            f'style="stroke: {colour}; stroke-width: 1.8; fill: none"/>'
            f'<path d="M{x2:g} {y2:g} l{-9 * way} -5 v10 z" style="fill: {colour}"/>'
        )
        if label:
            self.text((x1 + x2) / 2, min(y1, y2) - 7, label, style="font-size: 12px")

    def svg(self) -> str:
        body = "\n".join(self.pieces)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'role="img" fill="currentColor" font-family="sans-serif" font-size="14" '
            f'style="max-width: {self.width}px; width: 100%; height: auto">\n'
            f"<title>{escape(self.title)}</title>\n{body}\n</svg>\n"
        )


class Sequence(Picture):
    """Messages between actors, from top to bottom."""

    def __init__(self, title: str, *actors: str) -> None:
        super().__init__(760, title)
        gap = 580 / (len(actors) - 1)
        self.at = {actor: 90 + gap * number for number, actor in enumerate(actors)}
        self.y = 70

    def send(self, sender: str, receiver: str, label: str, *, wrong: bool = False) -> None:
        start, end = self.at[sender], self.at[receiver]
        self.arrow(start, self.y, end, self.y, label, colour=WRONG if wrong else ACCENT)
        self.y += 40

    def note(self, actor: str, *lines: str, wrong: bool = False) -> None:
        width = 8 * max(map(len, lines)) + 20
        height = 20 * len(lines) + 10
        y = self.y - 22
        x = min(max(self.at[actor] - width / 2, 2), self.width - width - 2)
        self.pieces.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height}" rx="6" '
            f'style="fill: var(--color-background-primary, none); stroke: none"/>'
        )
        self.box(x, y, width, height, stroke=WRONG if wrong else "")
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + 20 + 20 * number, line, style="font-size: 12px")
        self.y += height + 14

    def svg(self) -> str:
        drawn, self.pieces = self.pieces, []
        for actor, x in self.at.items():
            self.line(x, 40, x, self.y - 10, dashed=True)
            self.box(x - 80, 8, 160, 32, actor)
        self.pieces += drawn
        self.height = self.y
        return super().svg()


def data_flow() -> str:
    picture = Picture(960, "The flow of incoming and outgoing messages")
    picture.height = 290
    top, bottom = 95, 235
    tall = 34, 246
    picture.text(125, 22, "incoming →", style="opacity: 0.7", anchor="start")
    picture.text(125, 284, "← outgoing", style="opacity: 0.7", anchor="start")

    picture.box(8, *_tall(tall, 84), "broker")
    picture.box(150, *_tall(tall, 96), "transport", "socket, TLS,", "WebSocket")
    picture.box(268, bottom - 26, 84, 52, "writer", "queue")
    picture.box(404, *_tall(tall, 92), "codec", "fast path,", "Paho")
    picture.box(566, *_tall(tall, 92), "session", "pending calls,", "packet ids")
    for y, name in ((40, "streams"), (82, "calls"), (124, "on() handlers")):
        picture.box(714, y, 122, 34, name)
    picture.box(714, bottom - 20, 122, 40, "methods")
    picture.box(882, *_tall(tall, 70), "you")

    picture.arrow(92, top, 150, top, "bytes")
    picture.arrow(246, top, 404, top, "bytes")
    picture.arrow(496, top, 566, top, "packets")
    for y in (57, 99, 141):
        picture.arrow(658, top + 4 * (y - 99) / 42, 714, y)
        picture.arrow(836, y, 882, y)

    picture.arrow(882, bottom, 836, bottom)
    picture.arrow(714, bottom, 658, bottom)
    picture.arrow(566, bottom, 496, bottom, "packets")
    picture.arrow(404, bottom, 352, bottom, "bytes")
    picture.arrow(268, bottom, 246, bottom)
    picture.arrow(150, bottom, 92, bottom, "bytes")
    return picture.svg()


def _tall(span: tuple[int, int], width: int) -> tuple[int, int, int]:
    return span[0], width, span[1] - span[0] + 20


def refused_publish() -> str:
    picture = Sequence("A publish that the broker refuses", "your task", "Emitter", "broker")
    picture.send("your task", "Emitter", "await publish(…, qos=1)")
    picture.send("Emitter", "broker", "PUBLISH, packet 7")
    picture.note("broker", "the key lacks the", "permission to write")
    picture.send("broker", "Emitter", 'emitter/error/ {"req": 7, "status": 401}', wrong=True)
    picture.send("broker", "Emitter", "PUBACK 7")
    picture.note("Emitter", "an error before the", "acknowledgement: refused")
    picture.send("Emitter", "your task", "raise UnauthorizedError", wrong=True)
    return picture.svg()


def reconnection() -> str:
    picture = Sequence("A lost connection with resume=True", "your task", "Emitter", "broker")
    picture.send("broker", "Emitter", "message 1")
    picture.send("Emitter", "your task", "message 1")
    picture.note("broker", "connection lost;", "message 2 is stored", wrong=True)
    picture.note("Emitter", 'state "connecting",', "random wait")
    picture.send("Emitter", "broker", "CONNECT, SUBSCRIBE with last=0")
    picture.send("broker", "Emitter", "CONNACK, SUBACK")
    picture.note("Emitter", "everything restored:", "event connect")
    picture.send("broker", "Emitter", "message 3 (live): held back")
    picture.send("Emitter", "broker", "history request")
    picture.send("broker", "Emitter", "message 2 (stored)")
    picture.send("Emitter", "your task", "message 2, replayed=True")
    picture.send("Emitter", "your task", "message 3")
    return picture.svg()


DIAGRAMS = {
    "data-flow": data_flow,
    "refused-publish": refused_publish,
    "reconnection": reconnection,
}

if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (FOLDER / f"{name}.svg").write_text(draw())
