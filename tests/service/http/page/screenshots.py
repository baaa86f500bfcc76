"""Takes pictures of the page, with our own sample pictures: `python -m tests.service.http.page.screenshots FOLDER`.

docs/page.png is wide.png.
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.service.conftest import Server
from tests.service.http.page.conftest import CHROMIUM, Visit

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def main(folder: Path) -> None:
    """Writes wide.png, dark.png, phone.png and pictures of further states."""
    folder.mkdir(parents=True, exist_ok=True)
    with Server("--http-port", "0", "--device", "cpu") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        url = server.ready().http_url
        take(browser, url, folder / "empty.png", viewport=WIDE, samples=False)
        take(browser, url, folder / "wide.png", full_page=True, viewport=WIDE)
        take(browser, url, folder / "dark.png", full_page=True, viewport=WIDE, color_scheme="dark")
        phone = {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
        take(browser, url, folder / "phone.png", full_page=True, **phone)
        take(browser, url, folder / "phone-dark.png", full_page=True, color_scheme="dark", **phone)
        browser.close()


def take(
    browser: Browser, url: str, path: Path, *, samples: bool = True, full_page: bool = False, **options: object
) -> None:
    """A picture of the page in a window with these options; after classifying all samples, cat.jpg is selected."""
    context = browser.new_context(reduced_motion="reduce", **options)  # type: ignore[arg-type]
    visit = Visit(context.new_page(), url)
    page = visit.open()
    if samples:
        page.get_by_role("button", name="Classify all 7").click()
        page.locator(".tile[data-state=classified]").nth(6).wait_for()
        page.locator(".tile[title='cat.jpg']").click()
        page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=path, full_page=full_page)
    context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
