"""
Draw the web chat: ``python -m docs.pictures.web_chat``, with what ``nox -s browser`` installs.

``web-chat-desktop.png`` and ``web-chat-phone.png`` show two browsers in the same chat.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.browser import Browser, Chat

HERE = Path(__file__).parent
TEXTS = [
    ("Ann", "Morning! Is the new sensor in the greenhouse up?"),
    ("Ben", "Yes. 21.4 °C, and the broker stores its readings for an hour."),
    ("Ben", "If its connection is lost, it sends the rest later."),
    ("Ann", "I pulled the plug of the router for a minute: nothing is missing."),
    ("Chloe", "My train was in a tunnel, and I could still read all of this."),
    ("Ben", "Nice. Coffee?"),
]


def main() -> None:
    with ExitStack() as stack:
        chat = Chat()
        stack.callback(chat.close)
        browsers = {}
        for name, size in (("Ann", "desktop"), ("Ben", "phone"), ("Chloe", "desktop")):
            browsers[name] = browser = Browser(size=size, dark=size == "phone")
            stack.callback(browser.driver.quit)
            browser.join(chat.url, name)
        for number, (name, text) in enumerate(TEXTS, 1):
            browsers[name].send(text)
            for browser in browsers.values():
                browser.wait_for_messages(*(said for _, said in TEXTS[:number]))
        for name, file in (("Ann", "web-chat-desktop.png"), ("Ben", "web-chat-phone.png")):
            browsers[name].wait_for_people("Ann", "Ben", "Chloe")
            driver = browsers[name].driver
            driver.execute_script("for (const it of document.getAnimations()) it.finish()")
            driver.save_screenshot(str(HERE / file))


if __name__ == "__main__":
    main()
