"""The page for everyone: keyboard, screen reader, narrow screens, dark mode, reduced motion."""

from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import FilePayload, Page, expect

from tests.conftest import REPOSITORY
from tests.service.http.page.conftest import SAMPLES, OpenVisit, Visit


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
    # From now on Playwright catches file dialogs; a listener that is added at the key press may come too late.
    page.on("filechooser", lambda chooser: None)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the answer")).to_be_focused()
    press_until(page, "Tab", "#choose")
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    press_until(page, "Tab", "#all-samples")
    page.keyboard.press("Enter")
    visit.wait_for_answers(len(SAMPLES))
    expect(page.locator("#all-samples")).to_be_focused()  # an answer does not take the focus away

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
    # Chromium gives an outline that is not drawn a width too.
    style, width = visit.page.evaluate(
        "() => { const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);"
        " return [outlineStyle, parseFloat(outlineWidth)]; }"
    )
    assert style == "solid"
    assert width >= 2


def test_a_screen_reader_hears_the_answer(visit: Visit) -> None:
    visit.page.get_by_role("button", name="cat", exact=True).click()
    expect(visit.page.get_by_role("status")).to_contain_text("cat.jpg: cat, ")
    expect(visit.page.get_by_role("option", selected=True)).to_have_accessible_name(visit.tiles()[0])
    bars = visit.page.get_by_role("list", name="Probability of each class").get_by_role("listitem")
    expect(bars).to_have_count(10)
    expect(bars.first).to_contain_text("cat")


def test_axe_finds_no_violation_in_any_state_in_light_and_dark_mode(new_visit: OpenVisit, tmp_path: Path) -> None:
    visit = new_visit(reduced_motion="reduce")
    axe = Axe()

    def check() -> None:
        # Only colours differ in dark mode.
        for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            visit.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            results = axe.run(visit.page, options=rules)
            assert results.violations_count == 0, results.generate_report()

    check()
    show_all_states(visit, tmp_path)
    check()
    visit.page.locator(".tile").first.click()
    check()


def test_a_narrow_screen_needs_no_horizontal_scrolling(new_visit: OpenVisit, tmp_path: Path) -> None:
    width = 320
    visit = new_visit(viewport={"width": width, "height": 700})
    measure = "document.documentElement.scrollWidth"
    assert visit.page.evaluate(measure) == width
    show_all_states(visit, tmp_path)
    assert visit.page.evaluate(measure) == width
    visit.page.locator(".tile").first.click()
    assert visit.page.evaluate(measure) == width
    expect(visit.page.locator(".verdict h2")).to_be_in_viewport()  # choosing a picture brings its answer into view


def test_dark_mode_follows_the_system(visit: Visit) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)
        colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert brightness["dark"] < 100 < 700 < brightness["light"]


def test_nothing_moves_if_the_user_wants_reduced_motion(visit: Visit) -> None:
    visit.page.get_by_role("button", name="cat", exact=True).click()
    visit.wait_for_answers(1)
    names = {}
    for motion in ("reduce", "no-preference"):
        visit.page.emulate_media(reduced_motion=motion)
        names[motion] = visit.page.evaluate("getComputedStyle(document.querySelector('.bars .fill')).animationName")
    assert names == {"reduce": "none", "no-preference": "grow"}


def test_hundreds_of_pictures_stay_one_stop_for_the_keyboard(visit: Visit) -> None:
    content = (REPOSITORY / "samples/bird.png").read_bytes()
    files = [FilePayload(name=f"{row}.png", mimeType="image/png", buffer=content) for row in range(200)]
    visit.page.locator("#files").set_input_files(files)
    visit.wait_for_answers(200)
    assert visit.page.locator(".tile[tabindex='0']").count() == 1
