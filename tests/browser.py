"""What the tests of pages share: a browser, servers, what goes wrong on a page, its controls."""

import ipaddress
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOCAL = {"file", "data", "blob", "about"}  # schemes that ask no host
#: What a keyboard must reach: HTML's own controls and what says it is one.
CONTROLS = (
    "input, select, textarea, button, a[href], [contenteditable=true], "
    "[role=slider], [role=button], [role=tab]"
)
SLIDERS = ".widget-slider [role=slider]"
KERNEL_ERROR = re.compile(rb'"msg_type": ?"error"')


def system_browser() -> str | None:
    """The path of this system's Chromium; ``None`` leaves the choice to Playwright."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def is_local(url: str) -> bool:
    """Whether a request for ``url`` stays on this machine."""
    parts = urlsplit(url)
    if parts.scheme in LOCAL or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


class Watch:
    """Everything that goes wrong on a page from now on; it blocks nothing.

    ``errors`` (console, uncaught, and a kernel's own), ``failed`` (requests without an answer,
    or with a status of 400 and more), ``foreign`` (requests to another host). ``problems()`` is
    all of them.
    """

    def __init__(self, page, *, allowed: tuple[str, ...] = ()):
        self.page, self.allowed = page, allowed
        self.errors, self.failed, self.foreign = [], [], []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._note(self.errors, f"uncaught: {error}"))
        page.on("request", self._request)
        page.on("response", self._response)
        page.on("requestfailed", self._failed)
        page.on("websocket", lambda socket: socket.on("framereceived", self._frame))

    def problems(self) -> list[str]:
        """One line per problem, but those that contain a text in ``allowed``."""
        return self.errors + self.failed + self.foreign

    def _note(self, kind: list[str], line: str) -> None:
        if not any(text in line for text in self.allowed):
            kind.append(line)

    def _console(self, message) -> None:
        if message.type == "error":
            where = message.location.get("url", "")
            self._note(self.errors, f"console: {message.text} ({where})")

    def _request(self, request) -> None:
        if not is_local(request.url):
            self._note(self.foreign, f"another host: {request.url}")

    def _response(self, response) -> None:
        if response.status >= 400:
            self._note(self.failed, f"status {response.status}: {response.url}")

    def _failed(self, request) -> None:
        # a page that is left or reloaded aborts what it was still loading
        if request.failure != "net::ERR_ABORTED":
            self._note(self.failed, f"{request.failure}: {request.url}")

    def _frame(self, payload: str | bytes) -> None:
        """What a kernel says, also of a widget's callback whose error no cell shows."""
        data = payload.encode() if isinstance(payload, str) else payload
        if KERNEL_ERROR.search(data):
            self._note(self.errors, f"kernel: {data[-800:].decode(errors='replace')}")


@contextmanager
def served(
    command: Sequence[str], *, ready: str, **popen
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server in a process of its own, as long as the block; its address and the process.

    Args:
        command: Prints a line that contains the address.
        ready: Regular expression of that line; its first group is the address.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **popen,
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if found := re.search(ready, line):
                Thread(target=process.stdout.read, daemon=True).start()  # a full pipe blocks it
                yield found[1], process
                break
        else:
            raise RuntimeError(f"{command[0]} ended before it was ready:\n{''.join(lines)}")
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pictures(page) -> list[str]:
    """What the widgets show once it stays as it is: pictures, pixels of canvases, tables."""
    wait_for_change(page, [])
    shown, before = page.evaluate(f"() => {_PICTURES}"), []
    while shown != before:
        page.wait_for_timeout(300)
        shown, before = page.evaluate(f"() => {_PICTURES}"), shown
    return shown


def wait_for_change(page, before: list[str]) -> None:
    """Wait until the widgets show something else than ``before``."""
    page.wait_for_function(f"(before) => {_PICTURES}.join() !== before.join()", arg=before)


def push(slider) -> None:
    """Move a slider by one step with the arrow keys, and see that it moved."""
    before = slider.get_attribute("aria-valuenow")
    slider.focus()
    slider.press("ArrowLeft" if _at_end(slider) else "ArrowRight")
    assert slider.get_attribute("aria-valuenow") != before


def drag(page, slider, by: int = 150) -> None:
    """Drag a slider's handle ``by`` pixels with the mouse, to the left where it is at its end."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - by if _at_end(slider) else x + by, y, steps=5)
    page.mouse.up()


def _at_end(slider) -> bool:
    return slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")


def controls(page, inside: str = "body") -> set[str]:
    """The controls in ``inside`` that can be seen and are not disabled, each by its name."""
    return set(
        page.eval_on_selector_all(
            inside, f"(roots) => {{ {_NAME} {_CONTROLS} return roots.flatMap(controls).map(name) }}"
        )
    )


def tabbed(page, *, at_most: int = 200) -> Iterator[str]:
    """Press Tab until the focus has been everywhere; the name of each control that gets it."""
    seen = set()
    for _ in range(at_most):
        page.keyboard.press("Tab")
        name = page.evaluate(f"() => {{ {_NAME} return name(document.activeElement) }}")
        if name in seen:
            return
        seen.add(name)
        yield name


_PICTURES = """
[...document.querySelectorAll(
    'img.jupyter-widgets, .jupyter-widgets canvas, .widget-html-content')]
    .map((node) => node.src || (node.toDataURL ? node.toDataURL() : node.innerHTML))
"""
# The number of a control among all elements tells two with the same label apart.
_NAME = """
const name = (node) => {
    const label = node.getAttribute('aria-label') || (node.labels && node.labels[0]?.innerText)
        || node.getAttribute('aria-valuetext') || node.innerText || node.title || '';
    const number = [...document.querySelectorAll('*')].indexOf(node);
    return `${node.tagName.toLowerCase()} ${number} ${label.trim().slice(0, 40)}`;
};
"""
_CONTROLS = f"""
const controls = (root) => [...root.querySelectorAll(`{CONTROLS}`)].filter((node) =>
    node.checkVisibility({{ visibilityProperty: true }}) && !node.disabled
    && node.getBoundingClientRect().width > 0);
"""
