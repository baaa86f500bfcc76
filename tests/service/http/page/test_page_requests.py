"""The requests of the page: many pictures, progress, cancelling, a busy or failing server, and tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from service.client import Client
from tests.service.conftest import Server
from tests.service.http.page.conftest import SAMPLES, OpenVisit, Visit, many_pictures, problem

CLASSIFY = "**/v1/classify*"
CAT = next(path for path in SAMPLES if path.name == "cat.jpg")


class Held:
    """Requests for classification that the test answers when it wants to."""

    def __init__(self, visit: Visit) -> None:
        self.routes: list[Route] = []
        self._page, self._holding = visit.page, True
        visit.page.route(CLASSIFY, self._on_request)

    def _on_request(self, route: Route) -> None:
        if self._holding:
            self.routes.append(route)
        else:
            route.continue_()

    def wait_for(self, count: int) -> None:
        """Waits for this many requests, and a little longer for more."""
        while len(self.routes) < count:  # the time limit of pytest ends this
            self._page.wait_for_timeout(20)
        self._page.wait_for_timeout(100)

    def release(self) -> None:
        """Sends all requests to the server, the held ones and those that follow."""
        self._holding = False
        for route in self.routes:
            route.continue_()
        self.routes.clear()


def test_many_pictures_are_sent_a_few_at_a_time_and_each_gets_its_own_answer(
    visit: Visit, page_server: Server, tmp_path: Path
) -> None:
    paths = many_pictures(tmp_path, 42)
    held = Held(visit)
    visit.choose(*paths)
    expect(visit.page.locator("#progress-text")).to_have_text("0 of 42 pictures")
    held.wait_for(3)
    assert [(route.request.post_data_buffer or b"").count(b'filename="') for route in held.routes] == [8, 8, 8]

    held.routes.pop(0).continue_()
    expect(visit.page.locator("#progress-text")).to_have_text("8 of 42 pictures")
    bar = visit.page.get_by_role("progressbar", name="8 of 42 pictures")
    assert (bar.evaluate("(bar) => bar.value"), bar.evaluate("(bar) => bar.max")) == (8, 42)

    held.release()
    visit.wait_for_answers(len(paths))
    with Client(page_server.target) as client:
        answers = client.classify(paths)
    assert visit.tiles() == [
        f"{path.name}: {answer.best.name}, {100 * answer.best.probability:.0f}%"
        for path, answer in zip(paths, answers, strict=True)
    ]
    expect(visit.page.locator("#summary")).to_contain_text("42 classified, in")
    expect(visit.page.get_by_role("status")).to_contain_text("42 classified, in")
    expect(visit.page.locator("#progress")).to_be_hidden()


def test_cancelling_keeps_the_answers_that_arrived_and_drops_the_other_pictures(visit: Visit, tmp_path: Path) -> None:
    held = Held(visit)
    visit.choose(*many_pictures(tmp_path, 30))
    held.wait_for(3)
    held.routes.pop(0).continue_()
    visit.wait_for_answers(8)
    with visit.page.expect_event("requestfailed"):  # the requests in flight are ended, not only forgotten
        visit.page.get_by_role("button", name="Cancel").click()
    expect(visit.page.locator(".tile")).to_have_count(8)
    expect(visit.page.get_by_role("status")).to_have_text("Cancelled: 8 of 30 pictures have an answer")
    expect(visit.page.get_by_role("button", name="Clear")).to_be_focused()

    visit.page.unroute(CLASSIFY)
    visit.choose(CAT)
    visit.wait_for_answers(9)
    assert visit.tiles()[-1].startswith("cat.jpg: cat")


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(visit: Visit) -> None:
    visit.expected_statuses = {429}
    refusals = [{**problem(429, "the server is full"), "headers": {"Retry-After": "1"}}]
    times: list[float] = []

    def answer(route: Route) -> None:
        times.append(visit.page.evaluate("performance.now()"))
        if refusals:
            route.fulfill(**refusals.pop())
        else:
            route.continue_()

    visit.page.route(CLASSIFY, answer)
    visit.choose(CAT)
    expect(visit.page.locator("#progress-text")).to_have_text("Waiting 1.0 s, then asking again: the server is full")
    visit.wait_for_answers(1)
    assert visit.tiles()[0].startswith("cat.jpg: cat")
    assert len(times) == 2
    assert times[1] - times[0] >= 900


def test_a_lost_connection_is_tried_again(visit: Visit) -> None:
    lost: list[Route] = []

    def answer(route: Route) -> None:
        if lost:
            route.continue_()
        else:
            lost.append(route)
            route.abort("connectionreset")

    visit.page.route(CLASSIFY, answer)
    visit.choose(CAT)
    visit.wait_for_answers(1)
    assert visit.tiles()[0].startswith("cat.jpg: cat")
    visit.problems.remove("Failed to load resource: net::ERR_CONNECTION_RESET")


def test_a_request_that_failed_can_be_tried_again(visit: Visit) -> None:
    visit.expected_statuses = {500}
    visit.page.route(CLASSIFY, lambda route: route.fulfill(**problem(500, "the engine failed on this batch")))
    visit.choose(CAT)
    visit.wait_for_answers(1)
    assert visit.tiles() == ["cat.jpg: no answer"]
    expect(visit.page.locator(".verdict .error-text")).to_have_text("the engine failed on this batch")

    visit.page.unroute(CLASSIFY)
    visit.page.get_by_role("button", name="Try failed ones again").click()
    expect(visit.page.locator(".verdict h2")).to_contain_text("cat")
    expect(visit.page.get_by_role("button", name="Try failed ones again")).to_be_hidden()


def test_a_model_that_replaces_the_first_one_is_named(visit: Visit) -> None:
    def replaced(route: Route) -> None:
        answer = route.fetch()
        content = answer.json()
        content.get("model", content)["version"] = "the-next"  # /v1/model describes the model, an answer names it
        route.fulfill(response=answer, json=content)

    visit.page.route("**/v1/*", replaced)
    expect(visit.page.locator("#fact-version")).not_to_have_text("the-next")
    visit.choose(CAT)
    visit.wait_for_answers(1)
    expect(visit.page.locator("#fact-version")).to_have_text("the-next")
    expect(visit.page.locator(".small-facts")).to_contain_text("the-next")


def test_clearing_removes_all_pictures(visit: Visit) -> None:
    visit.choose(CAT)
    visit.wait_for_answers(1)
    visit.page.get_by_role("button", name="Clear").click()
    expect(visit.page.locator(".tile")).to_have_count(0)
    expect(visit.page.get_by_role("heading", name="The answer appears here")).to_be_visible()
    expect(visit.page.get_by_role("button", name="Choose pictures")).to_be_focused()


def test_a_file_that_fits_into_no_request_is_refused_with_the_limit_and_not_sent(visit: Visit, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    with large.open("wb") as file:
        file.truncate(9 * 2**20)
    visit.choose(large)
    visit.wait_for_answers(1)
    expect(visit.page.locator(".verdict .error-text")).to_contain_text("accepts at most 8388608 bytes in a request")
    assert not [url for url in visit.requested if "classify" in url]


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that needs the token 'the-right-token-of-this-test'."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("the-right-token-of-this-test\n")
    with Server("--http-port", "0", "--device", "cpu", "--token-file", tokens) as server:
        yield server.ready()


def test_the_page_asks_for_the_token_that_the_server_needs_and_keeps_it_in_memory_only(
    new_visit: OpenVisit, locked_server: Server
) -> None:
    visit = new_visit(locked_server.http_url, load=False)
    visit.expected_statuses = {401}
    page = visit.page
    page.goto(visit.url)
    token = page.get_by_label("Token", exact=True)
    expect(token).to_be_focused()
    page.keyboard.type("a-wrong-token")
    page.keyboard.press("Enter")
    expect(page.locator("#token-reason")).to_contain_text("token")

    token.fill("the-right-token-of-this-test")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="cat", exact=True).click()
    visit.wait_for_answers(1)
    assert visit.tiles()[0].startswith("cat.jpg: cat")
    stored = "JSON.stringify([localStorage, sessionStorage]) + document.cookie + location + document.body.innerHTML"
    assert "the-right-token" not in page.evaluate(stored)
    assert token.input_value() == ""


def test_without_a_token_the_page_says_what_is_missing_and_asks_again_on_request(
    new_visit: OpenVisit, locked_server: Server
) -> None:
    visit = new_visit(locked_server.http_url, load=False)
    visit.expected_statuses = {401}
    visit.page.goto(visit.url)
    token = visit.page.get_by_label("Token", exact=True)
    expect(token).to_be_focused()
    token.press("Escape")
    expect(visit.page.get_by_role("alert").first).to_contain_text("The server needs a token")
    visit.page.get_by_role("button", name="Try again").click()
    expect(visit.page.get_by_label("Token", exact=True)).to_be_focused()
