"""
Test the web chat example in headless Chromium: ``python -m nox -s browser``.

The server and its broker are processes, so that tests can kill them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from subprocess import Popen
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.command import run, running

SIZES = {"phone": (390, 844), "small phone": (320, 568), "desktop": (1280, 800)}


class Chat:
    """The chat's server and its broker."""

    def __init__(self) -> None:
        output = run("-m", "emitter_anyio", "license").stdout
        self._license, self._secret = re.findall(r" (\S+)$", output, re.MULTILINE)
        self._ports = {"broker": "0", "server": "0"}
        self._processes: dict[str, ExitStack] = {}
        self.start_broker()
        self.start_server()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['server']}/"

    def start_broker(self) -> None:
        self._start(
            "broker",
            *("-m", "emitter_anyio", "broker", "--license", self._license),
            *("--port", self._ports["broker"]),
        )

    def start_server(self) -> None:
        self._start(
            "server",
            *("-m", "uvicorn", "examples.web_chat.app:app", "--port", self._ports["server"]),
            EMITTER_URL=f"mqtt://127.0.0.1:{self._ports['broker']}",
            EMITTER_SECRET=self._secret,
        )

    def kill(self, name: str) -> None:
        self._processes.pop(name).close()

    def close(self) -> None:
        for name in [*self._processes]:
            self.kill(name)

    def _start(self, name: str, *command: str, **environment: str) -> None:
        with ExitStack() as stack:
            process = stack.enter_context(running(*command, environment=environment))
            self._ports[name] = _port(process, "stdout" if name == "broker" else "stderr")
            self._processes[name] = stack.pop_all()


def _port(process: Popen[str], where: str) -> str:
    output = ""
    for line in getattr(process, where):
        output += line
        if match := re.search(r"(?:listening|running) on \w+://[\d.]+:(\d+)", line):
            return match[1]
    pytest.fail(f"the process ended; its output: {output}")


class Browser:
    """A browser: one user of the chat."""

    def __init__(self, *, size: str = "desktop", dark: bool = False) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        options.add_argument("--headless=new")
        options.add_argument("--disable-dev-shm-usage")
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium does not run as root with its sandbox
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        self.show(size, dark=dark)

    def show(self, size: str, *, dark: bool = False) -> None:
        width, height = SIZES[size]
        self.execute_cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size != "desktop",
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.execute_cdp("Emulation.setEmulatedMedia", features=[scheme])

    def execute_cdp(self, command: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(command, arguments)

    def set_offline(self, offline: bool) -> None:
        self.execute_cdp("Network.enable")
        self.execute_cdp(
            "Network.emulateNetworkConditions",
            offline=offline,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def join(self, url: str, name: str) -> None:
        self.driver.get(url)
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.refresh()
        self.driver.find_element(By.ID, "name").send_keys(name)
        self.driver.find_element(By.CSS_SELECTOR, "#join button").click()
        self.wait_for_status("connected", "Connected")

    def send(self, text: str) -> None:
        self.driver.find_element(By.ID, "text").send_keys(f"{text}\n")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((it) => it.textContent)"
        return list(self.driver.execute_script(script, selector))

    def wait_for_texts(self, selector: str, *wanted: str) -> None:
        """Wait until the elements have exactly these texts, in this order."""
        seen: list[str] = []

        def look(_: object) -> bool:
            seen[:] = self.texts(selector)
            return seen == [*wanted]

        try:
            WebDriverWait(self.driver, 30, poll_frequency=0.05).until(look)
        except TimeoutException:
            assert seen == [*wanted]

    def wait_for_status(self, state: str, words: str) -> None:
        self.wait_for_texts(f'#status[data-state="{state}"]', words)

    def wait_for_people(self, *names: str) -> None:
        self.wait_for_texts("#people li > span:last-child", *names)

    def wait_for_messages(self, *messages: str) -> None:
        """Wait until exactly these messages are shown as delivered, in this order."""
        self.wait_for_texts(".message:not(.sending) p", *messages)

    def wait_for_pending(self, *messages: str) -> None:
        """Wait until exactly these messages are shown as not yet sent, in this order."""
        self.wait_for_texts(".message.sending p", *messages)

    def console_messages(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]  # of Selenium


@pytest.fixture
def chat() -> Iterator[Chat]:
    chat = Chat()
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def browsers() -> Iterator[tuple[Browser, Browser]]:
    with ExitStack() as stack:
        opened = []
        for size in ("desktop", "phone"):
            browser = Browser(size=size)
            stack.callback(browser.driver.quit)
            opened.append(browser)
        yield opened[0], opened[1]


@pytest.fixture
def ann_and_ben(chat: Chat, browsers: tuple[Browser, Browser]) -> Iterator[tuple[Browser, Browser]]:
    """Ann with a desktop browser and Ben with a phone, both in the chat."""
    for browser, name in zip(browsers, ("Ann", "Ben"), strict=True):
        browser.join(chat.url, name)
    for browser in browsers:
        browser.wait_for_people("Ann", "Ben")
    yield browsers
    for browser in browsers:
        browser.set_offline(False)
        browser.driver.get("about:blank")
        browser.console_messages()


def test_messages_reach_both_users(ann_and_ben: tuple[Browser, Browser]) -> None:
    ann, ben = ann_and_ben
    ann.send("Are you there?")
    ben.wait_for_messages("Are you there?")
    assert ben.texts(".message b") == ["Ann"]
    ben.send("<img src=x onerror=\"document.title = 'bad'\"> & <b>bold</b>")
    ann.wait_for_messages(
        "Are you there?", "<img src=x onerror=\"document.title = 'bad'\"> & <b>bold</b>"
    )
    assert ann.driver.title == "Web chat"
    assert ann.console_messages() == ben.console_messages() == []


def test_user_who_returns_reads_missed_messages(ann_and_ben: tuple[Browser, Browser]) -> None:
    ann, ben = ann_and_ben
    ann.send("Hello")
    ben.wait_for_messages("Hello")
    url = ben.driver.current_url
    ben.driver.get("about:blank")
    ann.wait_for_people("Ann")
    ann.send("Ben?")
    ann.wait_for_messages("Hello", "Ben?")
    ben.driver.get(url)  # the page remembers the name, and the server sends earlier messages
    ben.wait_for_people("Ann", "Ben")
    ben.wait_for_messages("Hello", "Ben?")


def test_stored_messages_are_shown_in_order(
    chat: Chat, ann_and_ben: tuple[Browser, Browser]
) -> None:
    ann, ben = ann_and_ben
    texts = ["One", "Two", "Three"]
    for text in texts:
        ann.send(text)
    ben.wait_for_messages(*texts)
    url = ben.driver.current_url
    for browser in ann_and_ben:
        browser.driver.get("about:blank")
    chat.kill("server")
    chat.start_server()
    # A subscriber's replay has messages of the same second in reverse order.
    ben.driver.get(url)
    ben.wait_for_messages(*texts)


def test_offline_user_reconnects_and_sends_pending_messages(
    ann_and_ben: tuple[Browser, Browser],
) -> None:
    ann, ben = ann_and_ben
    ben.send("In the lift")
    ann.wait_for_messages("In the lift")
    ben.set_offline(True)
    ben.wait_for_status("lost", "Offline. Waiting for the network …")
    ann.wait_for_people("Ann")
    ann.send("Still there?")
    ann.wait_for_messages("In the lift", "Still there?")
    ben.send("Sent while offline")
    ben.wait_for_pending("Sent while offline")
    ben.wait_for_messages("In the lift")

    ben.set_offline(False)
    ben.wait_for_status("connected", "Reconnected")
    for browser in ann_and_ben:
        browser.wait_for_people("Ann", "Ben")
        browser.wait_for_messages("In the lift", "Still there?", "Sent while offline")
        browser.wait_for_pending()


def test_server_restart_delivers_pending_messages(
    chat: Chat, ann_and_ben: tuple[Browser, Browser]
) -> None:
    ann, ben = ann_and_ben
    ann.send("Before")
    ben.wait_for_messages("Before")
    chat.kill("server")
    for browser in ann_and_ben:
        browser.wait_for_status("lost", "Connection lost. Reconnecting …")
    ann.send("Pending")
    ann.wait_for_pending("Pending")
    chat.start_server()
    for browser in ann_and_ben:
        browser.wait_for_status("connected", "Reconnected")
        browser.wait_for_people("Ann", "Ben")
        browser.wait_for_messages("Before", "Pending")
        browser.wait_for_pending()


def test_broker_restart_delivers_pending_messages(
    chat: Chat, ann_and_ben: tuple[Browser, Browser]
) -> None:
    ann, _ = ann_and_ben
    chat.kill("broker")
    for browser in ann_and_ben:
        browser.wait_for_status("lost", "The server has lost its broker. Reconnecting …")
    ann.send("Pending")
    ann.wait_for_pending("Pending")
    chat.start_broker()
    for browser in ann_and_ben:
        browser.wait_for_status("connected", "Connected")
        browser.wait_for_messages("Pending")
        browser.wait_for_pending()


def test_page_fits_every_screen(ann_and_ben: tuple[Browser, Browser]) -> None:
    ann, ben = ann_and_ben
    texts = ["W" * 500, "https://example.org/" + "a/" * 200, "word " * 80, "last"]
    for text in texts:
        ann.send(text)
    ben.wait_for_messages(*(text.strip() for text in texts))
    for size in SIZES:
        for dark in (False, True):
            ben.show(size, dark=dark)
            width, height = SIZES[size]
            script = """
                const inside = (it) => {
                    const box = it.getBoundingClientRect();
                    return box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight;
                };
                return {
                    size: [innerWidth, innerHeight],
                    page: [document.documentElement.scrollWidth, document.body.scrollHeight],
                    messages: scroll.scrollWidth <= scroll.clientWidth,
                    usable: [...document.querySelectorAll("#status, #text, #composer button")]
                        .every(inside),
                    back: getComputedStyle(document.body).backgroundColor,
                };
            """.replace("scroll.", "document.getElementById('scroll').")
            assert ben.driver.execute_script(script) == {
                "size": [width, height],
                "page": [width, height],
                "messages": True,
                "usable": True,
                "back": "rgb(17, 17, 24)" if dark else "rgb(243, 243, 248)",
            }, (size, dark)


CONTRASTS = """
    for (const animation of document.getAnimations()) animation.finish();
    const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
        .getContext("2d", { willReadFrequently: true });
    const parse = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
        return { rgb: [red, green, blue], alpha: alpha / 255 };
    };
    const mix = (back, front, share) => back.map((it, i) => it + share * (front[i] - it));
    const over = (back, { rgb, alpha }) => mix(back, rgb, alpha);
    // The colours of the background and of the text of the last element, as the screen shows them.
    const paint = ([it, ...inner], back) => {
        const style = getComputedStyle(it), own = over(back, parse(style.backgroundColor));
        const inside = inner.length ? paint(inner, own) : [own, over(own, parse(style.color))];
        return inside.map((colour) => mix(back, colour, Number(style.opacity)));
    };
    const luminance = (rgb) => {
        const [red, green, blue] = rgb.map((it) => it / 255)
            .map((it) => (it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4));
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const contrast = (it) => {
        const path = [];
        for (let each = it; each; each = each.parentElement) path.unshift(each);
        const [dark, light] = paint(path, [255, 255, 255]).map(luminance).sort((a, b) => a - b);
        return (light + 0.05) / (dark + 0.05);
    };
    const hasText = (it) => it.checkVisibility() && it.getBoundingClientRect().width > 1 &&
        [...it.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const least = {};
    const look = (it) => {
        const name = it.id || it.className || it.localName;
        least[name] = Math.min(least[name] ?? 21, contrast(it));
    };
    for (const it of document.body.querySelectorAll("*")) if (hasText(it)) look(it);
    for (const it of document.querySelectorAll("[style*=--hue]")) {
        const old = it.style.getPropertyValue("--hue");
        for (let hue = 0; hue < 360; hue += 4) {
            it.style.setProperty("--hue", hue);
            for (const part of it.querySelectorAll("*")) if (hasText(part)) look(part);
        }
        it.style.setProperty("--hue", old);
    }
    return least;
"""
"""Returns the least contrast of the text of each kind of element, for names of every colour."""


def test_text_is_readable_with_and_without_a_connection(
    chat: Chat, ann_and_ben: tuple[Browser, Browser]
) -> None:
    ann, ben = ann_and_ben

    def check() -> None:
        for dark in (False, True):
            ann.show("desktop", dark=dark)
            contrasts = ann.driver.execute_script(CONTRASTS)
            assert {"avatar", "you", "status", "count", "b", "time", "p"} <= {*contrasts}
            unreadable = {name: value for name, value in contrasts.items() if value < 4.5}
            assert not unreadable, f"{dark=}"

    ann.send("Hello")
    ben.send("Hello, Ann")
    ann.wait_for_messages("Hello", "Hello, Ann")
    check()
    chat.kill("server")
    ann.wait_for_status("lost", "Connection lost. Reconnecting …")
    ann.send("Pending")
    ann.wait_for_pending("Pending")
    check()


def test_page_is_accessible_by_keyboard_and_screen_reader(
    ann_and_ben: tuple[Browser, Browser],
) -> None:
    ann, _ = ann_and_ben
    script = """
        return [...document.querySelectorAll("button, input, textarea, [tabindex]")]
            .filter((it) => !(it.innerText || it.ariaLabel || it.labels?.length ||
                              it.hasAttribute("aria-labelledby")));
    """
    assert ann.driver.execute_script(script) == []
    assert ann.driver.execute_script("return document.activeElement.id") == "text"
    assert ann.texts("#status[role=status]")
    live = ann.driver.find_element(By.ID, "messages")
    assert (live.get_attribute("role"), live.get_attribute("aria-live")) == ("log", "polite")
