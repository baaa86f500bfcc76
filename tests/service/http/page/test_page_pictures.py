"""The page in a browser: the ways in which pictures reach it, and what it shows of the answers."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import JSHandle, expect

from cifar_core.images import decode
from cifar_core.manifest import read_manifest
from cifar_core.pixels import IMAGE_SIZE, ImageRejected
from service.client import Client
from tests.conftest import REPOSITORY
from tests.service.conftest import Server
from tests.service.http.page.conftest import SAMPLES, OpenVisit, Visit, many_pictures

# Makes a DataTransfer that holds one file, as drag and drop and the clipboard do.
DATA_TRANSFER = """([name, type, content]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""
# The length of a full bar, and of each bar, in pixels. Not their boxes, which grow in an animation.
BAR_LENGTHS = """(bars) => [
  bars.querySelector(".track").clientWidth,
  ...[...bars.querySelectorAll(".fill")].map((fill) => parseFloat(getComputedStyle(fill).width)),
]"""
CANVAS_PIXELS = """(canvas) => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]"""


def transfer_of(visit: Visit, path: Path) -> JSHandle:
    content = base64.b64encode(path.read_bytes()).decode()
    return visit.page.evaluate_handle(DATA_TRANSFER, [path.name, "image/jpeg", content])


def sample(name: str) -> Path:
    return REPOSITORY / "samples" / name


def test_every_sample_picture_gets_the_answer_that_the_command_line_client_prints(
    visit: Visit, page_server: Server
) -> None:
    command = [sys.executable, "-m", "service.client", "--server", page_server.target, "--json", "--top-k", "0"]
    printed = subprocess.run([*command, *map(str, SAMPLES)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in printed.stdout.splitlines()]
    assert visit.page.locator(".sample").count() == len(SAMPLES)

    visit.page.get_by_role("button", name="Classify all 7").click()
    visit.wait_for_answers(len(SAMPLES))

    for row, (path, answer) in enumerate(zip(SAMPLES, answers, strict=True)):
        visit.page.locator(".tile").nth(row).click()
        assert visit.page.locator(".verdict .file-name").inner_text() == path.name
        best = answer["classes"][0]
        assert visit.page.locator(".verdict h2").inner_text() == f"{best['name']} {best['probability']:.1%}"
        shown = {name: float(value.rstrip("%")) for name, value in visit.bars().items()}
        assert shown == {
            ranked["name"]: pytest.approx(100 * ranked["probability"], abs=0.0501) for ranked in answer["classes"]
        }
        # A bar is at least two pixels wide, so that a class with a probability of nearly 0 has one.
        wide, *lengths = visit.page.locator(".bars").evaluate(BAR_LENGTHS)
        assert lengths == [
            pytest.approx(max(2, wide * ranked["probability"]), abs=0.02 * wide) for ranked in answer["classes"]
        ]


def test_each_sample_picture_is_shown_at_its_name(visit: Visit) -> None:
    tiles = visit.page.locator(".sample").all()
    assert [tile.inner_text() for tile in tiles] == [path.stem for path in SAMPLES]
    sources = [tile.locator("img").evaluate("(image) => image.currentSrc") for tile in tiles]
    assert sources == [f"{visit.url}/samples/{path.name}" for path in SAMPLES]


@pytest.mark.parametrize("size", [(120, 40), (40, 120)])
def test_the_square_that_the_server_uses_is_marked_in_the_middle_of_the_picture(
    visit: Visit, tmp_path: Path, size: tuple[int, int]
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", size, "green").save(picture)
    visit.choose(picture)
    visit.wait_for_answers(1)
    shown, mark = visit.page.locator(".shot img").bounding_box(), visit.page.locator(".crop").bounding_box()
    assert shown is not None
    assert mark is not None
    assert shown["width"] / shown["height"] == pytest.approx(size[0] / size[1], rel=0.05)
    for start, length in (("x", "width"), ("y", "height")):
        assert mark[length] == pytest.approx(min(shown["width"], shown["height"]), abs=1)
        assert mark[start] + mark[length] / 2 == pytest.approx(shown[start] + shown[length] / 2, abs=1)


def test_the_page_shows_the_pixels_that_the_network_computes_on_enlarged_without_smoothing(visit: Visit) -> None:
    visit.page.get_by_role("button", name="cat", exact=True).click()
    canvas = visit.page.get_by_role("img", name="The 32 by 32 pixels that the network sees of cat.jpg")
    shown = canvas.evaluate(CANVAS_PIXELS)
    expected = decode(sample("cat.jpg").read_bytes())
    assert len(shown) == IMAGE_SIZE * IMAGE_SIZE * 4
    assert [value for place, value in enumerate(shown) if place % 4 < 3] == expected.ravel().tolist()
    assert canvas.evaluate("(canvas) => getComputedStyle(canvas).imageRendering") == "pixelated"
    box = canvas.bounding_box()
    assert box is not None
    assert box["width"] > 4 * IMAGE_SIZE


def test_the_page_names_the_model_its_variant_its_measured_accuracy_and_the_time_of_an_answer(
    visit: Visit, page_server: Server
) -> None:
    with Client(page_server.target) as client:
        model = client.model()
    accuracy = read_manifest(REPOSITORY / "exported").variants[model.variant].test_accuracy
    expect(visit.page.locator("#fact-accuracy")).to_have_text(f"{accuracy:.2%}")
    expect(visit.page.locator("#fact-version")).to_have_text(model.version)
    expect(visit.page.locator("#fact-variant")).to_have_text(model.variant)
    expect(visit.page.locator("#fact-device")).to_have_text(f"on {model.device}")
    for name in model.classes:
        expect(visit.page.locator("#class-list")).to_contain_text(name)

    with visit.page.expect_response("**/v1/classify*") as answered:
        visit.page.get_by_role("button", name="ship", exact=True).click()
    milliseconds = 1000 * answered.value.json()["seconds"]
    shown = visit.page.locator(".small-facts div", has_text="Time in the server").locator("dd").inner_text()
    number, unit = shown.split()
    assert unit in ("ms", "s")
    assert float(number) * {"ms": 1, "s": 1000}[unit] == pytest.approx(milliseconds, rel=0.1)


def test_a_bad_file_shows_the_servers_own_message_and_the_other_files_are_classified(
    visit: Visit, tmp_path: Path
) -> None:
    damaged, text = tmp_path / "damaged.png", tmp_path / "notes.txt"
    damaged.write_bytes(sample("ship.png").read_bytes()[:2000])
    text.write_text("This is not a picture.")
    messages = {}
    for path in (damaged, text):
        with pytest.raises(ImageRejected) as rejected:
            decode(path.read_bytes())
        messages[path.name] = str(rejected.value)

    visit.choose(damaged, sample("cat.jpg"), text)
    visit.wait_for_answers(3)
    assert [label.rsplit(", ", 1)[0] for label in visit.tiles()] == [
        "damaged.png: not readable", "cat.jpg: cat", "notes.txt: not readable",
    ]  # fmt: skip
    for row, name in ((0, damaged.name), (2, text.name)):
        visit.page.locator(".tile").nth(row).click()
        expect(visit.page.locator(".verdict .error-text")).to_have_text(messages[name])
    expect(visit.page.locator("#summary")).to_contain_text("1 classified, 2 not readable")


def test_a_single_bad_file_shows_the_servers_own_message(visit: Visit, tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    visit.expected_statuses = {400, 422}
    visit.choose(empty)
    visit.wait_for_answers(1)
    expect(visit.page.locator(".verdict .error-text")).to_contain_text("empty")


def test_a_picture_can_be_dropped(visit: Visit) -> None:
    transfer = transfer_of(visit, sample("cat.jpg"))
    prompt = visit.page.locator(".drop-title")
    visit.page.dispatch_event("#drop", "dragenter", {"dataTransfer": transfer})
    expect(prompt).to_contain_text("Let go", use_inner_text=True)
    visit.page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(prompt).to_contain_text("Drop pictures here", use_inner_text=True)
    visit.wait_for_answers(1)
    assert visit.tiles()[0].startswith("cat.jpg: cat")


def drop(visit: Visit, *paths: Path) -> None:
    """Drops files and folders on the page as the browser does when a user lets go of them."""
    browser = visit.page.context.new_cdp_session(visit.page)
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        browser.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})


def test_several_pictures_can_be_dropped(visit: Visit) -> None:
    drop(visit, sample("cat.jpg"), sample("airplane.png"))
    visit.wait_for_answers(2)
    assert sorted(tile.partition(":")[0] for tile in visit.tiles()) == ["airplane.png", "cat.jpg"]


def test_of_dropped_folders_all_pictures_are_classified_at_any_depth(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "outer/inner").mkdir(parents=True)
    # A browser hands out the entries of a folder in portions of a hundred.
    names = [path.name for path in many_pictures(tmp_path / "outer/inner", 120)]
    (tmp_path / "outer/notes.txt").write_text("no picture")
    shutil.copy(sample("cat.jpg"), tmp_path / "outer/cat.jpg")
    drop(visit, tmp_path / "outer", sample("airplane.png"))
    visit.wait_for_answers(122)
    assert sorted(tile.partition(":")[0] for tile in visit.tiles()) == sorted([*names, "cat.jpg", "airplane.png"])


def test_a_picture_can_be_pasted(visit: Visit) -> None:
    transfer = transfer_of(visit, sample("cat.jpg"))
    visit.page.evaluate(
        "(transfer) => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true }))",
        transfer,
    )
    visit.wait_for_answers(1)
    assert visit.tiles()[0].startswith("cat.jpg: cat")


def test_pasting_text_says_that_there_is_no_picture(visit: Visit) -> None:
    visit.page.evaluate(
        "() => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: new DataTransfer() }))"
    )
    expect(visit.page.get_by_role("status")).to_have_text("There is no picture in the clipboard.")
    assert visit.tiles() == []


def test_pictures_can_be_chosen_in_the_file_dialog(visit: Visit) -> None:
    with visit.page.expect_file_chooser() as chooser:
        visit.page.get_by_role("button", name="Choose pictures").click()
    assert chooser.value.is_multiple()
    chooser.value.set_files([sample("cat.jpg"), sample("bird.png")])
    visit.wait_for_answers(2)
    assert [label.split(":")[0] for label in visit.tiles()] == ["cat.jpg", "bird.png"]


def test_a_photo_can_be_taken_with_the_camera_of_the_computer(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Take a photo").click()
    take = visit.page.get_by_role("button", name="Classify this view")
    expect(take).to_be_enabled()
    track = visit.page.evaluate_handle("document.getElementById('camera-video').srcObject.getTracks()[0]")
    assert track.evaluate("(track) => track.readyState") == "live"
    take.click()
    visit.wait_for_answers(1)
    assert visit.tiles()[0].startswith("photo.jpg: ")
    expect(visit.page.locator("#camera-dialog")).to_be_hidden()
    assert track.evaluate("(track) => track.readyState") == "ended"  # the camera is off


def test_a_phone_opens_its_camera_app(new_visit: OpenVisit) -> None:
    visit = new_visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert visit.page.locator("#capture").get_attribute("capture") == "environment"
    with visit.page.expect_file_chooser() as chooser:
        visit.page.get_by_role("button", name="Take a photo").click()
    chooser.value.set_files(sample("cat.jpg"))
    visit.wait_for_answers(1)


def test_a_file_name_with_html_is_shown_as_text(visit: Visit, tmp_path: Path) -> None:
    named = tmp_path / "<img src=x onerror=alert(1)>.png"
    named.write_bytes(many_pictures(tmp_path, 1)[0].read_bytes())
    visit.choose(named)
    visit.wait_for_answers(1)
    assert visit.page.locator(".verdict .file-name").inner_text() == named.name
