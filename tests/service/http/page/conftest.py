"""A real browser, Debian's Chromium driven by Playwright, and a real server with the page."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.conftest import REPOSITORY
from tests.service.conftest import Server

CHROMIUM = shutil.which("chromium")
SAMPLES = sorted(path for path in (REPOSITORY / "samples").iterdir() if path.suffix != ".md")
# What a test waits for comes later on a busy machine. Playwright itself would wait for 5 seconds.
expect.set_options(timeout=30_000)
# A browser writes this for every status that is not a success, also where a test wants one.
STATUS_LINE = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")


@dataclass
class Visit:
    """A page that is open in the browser, and what it did.

    Attributes:
        page: The page.
        url: Address of the server.
        requested: Addresses that the page has loaded.
        problems: Errors in the console, exceptions, and violations of the content security policy.
        expected_statuses: Statuses other than success that the test provokes.
    """

    page: Page
    url: str
    requested: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    expected_statuses: set[int] = field(default_factory=set)

    def watch(self) -> None:
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._on_console)

    def _on_console(self, message: ConsoleMessage) -> None:
        status = STATUS_LINE.match(message.text)
        if status and int(status[1]) in self.expected_statuses:
            return
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def open(self) -> Page:
        self.page.goto(self.url)
        self.page.locator(".sample").first.wait_for()
        return self.page

    def choose(self, *files: Path) -> None:
        self.page.locator("#files").set_input_files(files)

    def wait_for_answers(self, count: int) -> None:
        """Waits until this many pictures have an answer, or the reason why there is none."""
        expect(self.page.locator(".tile:not([data-state=waiting])")).to_have_count(count)

    def tiles(self) -> list[str]:
        """What a screen reader says for each picture in the list."""
        return [tile.get_attribute("aria-label") or "" for tile in self.page.locator(".tile").all()]

    def bars(self) -> dict[str, str]:
        """Class and probability, as text, in the order in which the page shows them."""
        rows = self.page.locator(".bars li").all()
        return {row.locator(".name").inner_text(): row.locator(".value").inner_text() for row in rows}

    def check(self) -> None:
        assert not self.problems, self.problems
        violations = self.page.evaluate("window.violations")
        assert not violations, violations
        elsewhere = [url for url in self.requested if not url.startswith((f"{self.url}/", f"blob:{self.url}/"))]
        assert not elsewhere, elsewhere


@pytest.fixture(scope="session")
def page_server() -> Iterator[Server]:
    """A server with the shipped model, for all tests of the page that leave it unchanged."""
    shared = Server("--http-port", "0", "--device", "cpu").ready()
    try:
        yield shared
        assert shared.stop() == 0, shared.log
    finally:
        shared.kill()


# Of a module, because no test can use asyncio before Playwright has ended.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs the browser chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # The sandbox cannot be used by root. The camera is a generated picture, and the user allows it.
        arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


OpenVisit = Callable[..., Visit]


@pytest.fixture
def new_visit(browser: Browser, page_server: Server) -> Iterator[OpenVisit]:
    """Opens the page in a browser window of its own; afterwards checks that it did nothing that it should not do."""
    visits: list[Visit] = []

    def open_visit(url: str | None = None, *, load: bool = True, **options: object) -> Visit:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        context.set_default_timeout(20_000)
        context.add_init_script(
            "window.violations = []; document.addEventListener('securitypolicyviolation',"
            " (event) => window.violations.push(`${event.violatedDirective}: ${event.blockedURI}`))"
        )
        visit = Visit(context.new_page(), url or page_server.http_url)
        visit.watch()
        visits.append(visit)
        if load:
            visit.open()
        return visit

    yield open_visit
    for visit in visits:
        visit.check()
        visit.page.context.close()


@pytest.fixture
def visit(new_visit: OpenVisit) -> Visit:
    """The page, loaded, in a window of the usual size."""
    return new_visit()


def problem(status: int, detail: str) -> dict[str, object]:
    """A refusal as the server writes it, for Route.fulfill."""
    body = {"type": "about:blank", "title": "refused", "status": status, "detail": detail}
    return {"status": status, "content_type": "application/problem+json", "body": json.dumps(body)}


def many_pictures(folder: Path, count: int) -> list[Path]:
    """Different small pictures, as files."""
    paths = [folder / f"{row:03d}.png" for row in range(count)]
    for row, path in enumerate(paths):
        with Image.open(SAMPLES[row % len(SAMPLES)]) as sample:
            sample.convert("RGB").resize((48, 40)).rotate(row).save(path)
    return paths
