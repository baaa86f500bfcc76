"""The page for everyone: keyboard, screen reader, narrow screens, dark mode, reduced motion."""

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.service.http.page.conftest import SAMPLES, OpenVisit, Visit, many_pictures

PHONE = {"width": 360, "height": 740}


def press_until(page: Page, key: str, focused: str) -> None:
    """Presses a key until an element that matches the selector has the focus."""
    for _ in range(40):
        page.keyboard.press(key)
        if page.evaluate("(selector) => document.activeElement.matches(selector)", focused):
            return
    raise AssertionError(f"{key} does not lead to {focused}")


def show_all_states(visit: Visit, folder: Path) -> None:
    """Pictures with answers, and one that cannot be read, which is selected."""
    bad = folder / ("a-file-name-without-any-place-to-break-it-" * 4 + ".png")
    bad.write_bytes(b"no picture")
    visit.choose(*SAMPLES, bad)
    visit.wait_for_answers(len(SAMPLES) + 1)
    visit.page.locator(".tile").last.click()
    expect(visit.page.locator(".verdict.error")).to_be_visible()


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the answer")).to_be_focused()
    press_until(page, "Tab", "#choose")
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    press_until(page, "Tab", ".sample.all")
    page.keyboard.press("Enter")
    visit.wait_for_answers(len(SAMPLES))
    expect(page.locator(".sample.all")).to_be_focused()  # an answer does not take the focus away

    press_until(page, "Tab", ".tile")
    names = [path.name for path in SAMPLES]
    shown = page.locator(".verdict .file-name")
    for key, name in (("ArrowRight", names[1]), ("End", names[-1]), ("ArrowLeft", names[-2]), ("Home", names[0])):
        page.keyboard.press(key)
        expect(shown).to_have_text(name)
        expect(page.locator(".tile[aria-selected=true]")).to_be_focused()
    page.keyboard.press("Tab")  # the list is one stop
    assert not page.evaluate("document.activeElement.matches('.tile')")


def test_the_focus_is_visible(visit: Visit) -> None:
    press_until(visit.page, "Tab", "#choose")
    outline = visit.page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert float(outline.removesuffix("px")) >= 2


def test_a_screen_reader_hears_the_answer(visit: Visit) -> None:
    visit.page.get_by_role("button", name="cat", exact=True).click()
    expect(visit.page.get_by_role("status")).to_contain_text("cat.jpg: cat, ")
    expect(visit.page.get_by_role("option", selected=True)).to_have_accessible_name(visit.tiles()[0])
    bars = visit.page.get_by_role("list", name="Probability of each class").get_by_role("listitem")
    expect(bars).to_have_count(10)
    expect(bars.first).to_contain_text("cat")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_any_state(new_visit: OpenVisit, scheme: str, tmp_path: Path) -> None:
    visit = new_visit(color_scheme=scheme, reduced_motion="reduce")
    axe = Axe()

    def check() -> None:
        results = axe.run(visit.page)
        assert results.violations_count == 0, results.generate_report()

    check()
    show_all_states(visit, tmp_path)
    check()
    visit.page.locator(".tile").first.click()
    check()


@pytest.mark.parametrize("width", [320, 360])
def test_a_narrow_screen_needs_no_horizontal_scrolling(new_visit: OpenVisit, width: int, tmp_path: Path) -> None:
    visit = new_visit(viewport={**PHONE, "width": width})
    measure = "document.documentElement.scrollWidth"
    assert visit.page.evaluate(measure) == width
    show_all_states(visit, tmp_path)
    assert visit.page.evaluate(measure) == width
    visit.page.locator(".tile").first.click()
    assert visit.page.evaluate(measure) == width
    expect(visit.page.locator(".verdict h2")).to_be_in_viewport()  # choosing a picture brings its answer into view


def test_dark_mode_follows_the_system(new_visit: OpenVisit) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        page = new_visit(color_scheme=scheme).page
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert brightness["dark"] < 100 < 700 < brightness["light"]


def test_nothing_moves_if_the_user_wants_reduced_motion(new_visit: OpenVisit) -> None:
    animation = "getComputedStyle(document.querySelector('.bars .fill')).animationName"
    names = {}
    for motion in ("reduce", "no-preference"):
        visit = new_visit(reduced_motion=motion)
        visit.page.get_by_role("button", name="cat", exact=True).click()
        visit.wait_for_answers(1)
        names[motion] = visit.page.evaluate(animation)
    assert names == {"reduce": "none", "no-preference": "grow"}


def test_hundreds_of_pictures_stay_one_stop_for_the_keyboard(visit: Visit, tmp_path: Path) -> None:
    visit.choose(*many_pictures(tmp_path, 200))
    visit.wait_for_answers(200)
    assert visit.page.locator(".tile[tabindex='0']").count() == 1
