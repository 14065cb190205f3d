"""
The web chat of the examples in Chromium, without a window: ``python -m nox -s browser``.

The server and its broker are processes, so that they can be killed.
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
    """The server of the chat, and its broker."""

    def __init__(self) -> None:
        made = run("-m", "emitter_anyio", "license").stdout
        self._license, self._secret = re.findall(r" (\S+)$", made, re.MULTILINE)
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
    said = ""
    for line in getattr(process, where):
        said += line
        if match := re.search(r"(?:listening|running) on \w+://[\d.]+:(\d+)", line):
            return match[1]
    pytest.fail(f"it has ended, and said: {said}")


class Browser:
    """One browser, which is somebody in the chat."""

    def __init__(self, *, size: str = "desktop", dark: bool = False) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        options.add_argument("--headless=new")
        options.add_argument("--disable-dev-shm-usage")
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # it does not run as root otherwise
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        self.show(size, dark=dark)

    def show(self, size: str, *, dark: bool = False) -> None:
        width, height = SIZES[size]
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size != "desktop",
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def tell(self, command: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(command, arguments)

    def offline(self, offline: bool) -> None:
        self.tell("Network.enable")
        self.tell(
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
        self.sees("connected", "Connected")

    def say(self, text: str) -> None:
        self.driver.find_element(By.ID, "text").send_keys(f"{text}\n")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((it) => it.textContent)"
        return list(self.driver.execute_script(script, selector))

    def until(self, selector: str, *wanted: str) -> None:
        """Wait until the page has just these texts there: as long as a test may take."""
        seen: list[str] = []

        def look(_: object) -> bool:
            seen[:] = self.texts(selector)
            return seen == [*wanted]

        try:
            WebDriverWait(self.driver, 30, poll_frequency=0.05).until(look)
        except TimeoutException:
            assert seen == [*wanted]

    def sees(self, state: str, words: str) -> None:
        self.until(f'#status[data-state="{state}"]', words)

    def sees_people(self, *names: str) -> None:
        self.until("#people li > span:last-child", *names)

    def reads(self, *messages: str) -> None:
        """Wait until just these have come, in this order; what is being sent is not among them."""
        self.until(".message:not(.waiting) p", *messages)

    def sends(self, *messages: str) -> None:
        self.until(".message.waiting p", *messages)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]  # of Selenium


@pytest.fixture
def chat() -> Iterator[Chat]:
    chat = Chat()
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def browsers() -> Iterator[tuple[Browser, Browser]]:
    with ExitStack() as stack:
        made = []
        for size in ("desktop", "phone"):
            browser = Browser(size=size)
            stack.callback(browser.driver.quit)
            made.append(browser)
        yield made[0], made[1]


@pytest.fixture
def two(chat: Chat, browsers: tuple[Browser, Browser]) -> Iterator[tuple[Browser, Browser]]:
    """Ann at a desk and Ben with a phone, both in the chat."""
    for browser, name in zip(browsers, ("Ann", "Ben"), strict=True):
        browser.join(chat.url, name)
    for browser in browsers:
        browser.sees_people("Ann", "Ben")
    yield browsers
    for browser in browsers:
        browser.offline(False)
        browser.driver.get("about:blank")
        browser.complaints()


def test_they_talk(two: tuple[Browser, Browser]) -> None:
    ann, ben = two
    ann.say("Is anybody there?")
    ben.reads("Is anybody there?")
    assert ben.texts(".message b") == ["Ann"]
    ben.say("<img src=x onerror=\"document.title = 'bad'\"> & <b>bold</b>")
    ann.reads("Is anybody there?", "<img src=x onerror=\"document.title = 'bad'\"> & <b>bold</b>")
    assert ann.driver.title == "Web chat"
    assert ann.complaints() == ben.complaints() == []


def test_one_leaves_and_comes_back(two: tuple[Browser, Browser]) -> None:
    ann, ben = two
    ann.say("Hello")
    ben.reads("Hello")
    here = ben.driver.current_url
    ben.driver.get("about:blank")
    ann.sees_people("Ann")
    ann.say("Ben?")
    ann.reads("Hello", "Ben?")
    ben.driver.get(here)  # the name is remembered, and what was said is read back
    ben.sees_people("Ann", "Ben")
    ben.reads("Hello", "Ben?")


def test_what_was_said_before_is_in_order(chat: Chat, two: tuple[Browser, Browser]) -> None:
    ann, ben = two
    said = ["One", "Two", "Three"]
    for text in said:
        ann.say(text)
    ben.reads(*said)
    here = ben.driver.current_url
    for browser in two:
        browser.driver.get("about:blank")
    chat.kill("server")
    chat.start_server()
    # The first subscriber gets what was stored in the same second the other way round.
    ben.driver.get(here)
    ben.reads(*said)


def test_one_is_cut_off_and_comes_back(two: tuple[Browser, Browser]) -> None:
    ann, ben = two
    ben.say("In the lift")
    ann.reads("In the lift")
    ben.offline(True)
    ben.sees("lost", "Offline. Waiting for the network …")
    ann.sees_people("Ann")
    ann.say("Still there?")
    ann.reads("In the lift", "Still there?")
    ben.say("Nobody hears me")
    ben.sends("Nobody hears me")
    ben.reads("In the lift")

    ben.offline(False)
    ben.sees("connected", "Connected again")
    for browser in two:
        browser.sees_people("Ann", "Ben")
        browser.reads("In the lift", "Still there?", "Nobody hears me")
        browser.sends()


def test_the_server_dies_and_comes_back(chat: Chat, two: tuple[Browser, Browser]) -> None:
    ann, ben = two
    ann.say("Before")
    ben.reads("Before")
    chat.kill("server")
    for browser in two:
        browser.sees("lost", "Connection lost. Trying again …")
    ann.say("Meanwhile")
    ann.sends("Meanwhile")
    chat.start_server()
    for browser in two:
        browser.sees("connected", "Connected again")
        browser.sees_people("Ann", "Ben")
        browser.reads("Before", "Meanwhile")
        browser.sends()


def test_the_broker_dies_and_comes_back(chat: Chat, two: tuple[Browser, Browser]) -> None:
    ann, _ = two
    chat.kill("broker")
    for browser in two:
        browser.sees("lost", "The server has lost its broker. Trying again …")
    ann.say("Meanwhile")
    ann.sends("Meanwhile")
    chat.start_broker()
    for browser in two:
        browser.sees("connected", "Connected")
        browser.reads("Meanwhile")
        browser.sends()


def test_it_fits_every_screen(two: tuple[Browser, Browser]) -> None:
    ann, ben = two
    words = ["W" * 500, "https://example.org/" + "a/" * 200, "word " * 80, "last"]
    for text in words:
        ann.say(text)
    ben.reads(*(text.strip() for text in words))
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


def test_the_keyboard_and_a_screen_reader(two: tuple[Browser, Browser]) -> None:
    ann, _ = two
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
