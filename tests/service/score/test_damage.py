"""What --resume does with an output whose files were damaged."""

import io
import json
import shutil

import pyarrow.parquet as pq
import pytest

from service.score.errors import ScoreError
from service.score.output import OutputFolder
from service.score.part_checksum import is_whole
from tests.service import exports
from tests.service.score.pictures import rows, score, write_images

PARTS = ("--rows-per-part", 20, "--batch-size", 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, linear):
    """A folder of images with one that is damaged, and the output of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "in", exports.pictures(59))
    (folder / "in/bad.png").write_bytes(b"")
    assert score(folder / "in", folder / "out", *PARTS, model=linear) == 1
    return folder / "in", folder / "out"


@pytest.fixture
def output(finished, tmp_path):
    """A copy of the output, to damage it."""
    return shutil.copytree(finished[1], tmp_path / "out")


def test_every_changed_byte_of_a_part_is_noticed(finished):
    content = (finished[1] / "part-000001.parquet").read_bytes()
    assert is_whole(io.BytesIO(content))
    for position in range(len(content)):
        damaged = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        assert not is_whole(io.BytesIO(damaged)), f"byte {position} of {len(content)}"


def test_every_missing_or_added_end_of_a_part_is_noticed(finished):
    content = (finished[1] / "part-000001.parquet").read_bytes()
    for damaged in [content[:end] for end in range(len(content))] + [content + b"\0", content + content]:
        assert not is_whole(io.BytesIO(damaged)), f"{len(damaged)} bytes of {len(content)}"


@pytest.mark.parametrize("old", [b"error", b"model_version", b"created_by", b"PAR1"])
def test_a_part_with_a_damaged_footer_is_computed_again_and_the_others_are_left(finished, output, linear, capsys, old):
    part = output / "part-000001.parquet"
    content = bytearray(part.read_bytes())
    position = content.rfind(old)
    if position < 0:
        position = len(content) - 8  # the length of the footer
    content[position] ^= 1
    part.write_bytes(content)
    before = {file: file.stat().st_mtime_ns for file in output.glob("part-*") if file != part}
    assert score(finished[0], output, *PARTS, "--resume", model=linear) == 1
    said = capsys.readouterr().out
    assert "1 parts are damaged and are computed again: part-000001.parquet" in said
    assert "1 images could not be classified" in said
    assert rows(output).equals(rows(finished[1]))
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_part_of_another_program_or_version_is_computed_again(finished, output, linear):
    part = output / "part-000001.parquet"
    pq.write_table(pq.read_table(part), part, write_page_checksum=True)
    assert score(finished[0], output, *PARTS, "--resume", model=linear) == 1
    assert part.read_bytes() == (finished[1] / part.name).read_bytes()


@pytest.mark.parametrize("same_run", [True, False])
def test_a_whole_part_of_another_place_or_run_is_computed_again(finished, output, linear, tmp_path, same_run):
    part = output / "part-000001.parquet"
    if same_run:
        shutil.copy(output / "part-000000.parquet", part)
    else:
        assert score(finished[0], tmp_path / "other", *PARTS, "--max-decode-seconds", "9", model=linear) == 1
        shutil.copy(tmp_path / "other" / part.name, part)
    assert part.read_bytes() != (finished[1] / part.name).read_bytes()
    assert score(finished[0], output, *PARTS, "--resume", model=linear) == 1
    assert part.read_bytes() == (finished[1] / part.name).read_bytes()


def test_a_huge_part_is_not_read_to_its_end(output):
    huge(output / "part-000001.parquet")
    assert OutputFolder(output).written_parts([20, 20, 20]) == {0: 0, 2: 1}


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def folder_in_place(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:500]), "damaged: its SHA-256 is not the one in _score.json"),
        (flipped, "damaged: its SHA-256 is not the one in _score.json"),
        (lambda file: file.write_bytes(b""), "damaged: its SHA-256 is not the one in _score.json"),
        (lambda file: shutil.copy(file.with_name("part-000000.parquet"), file), "damaged: its SHA-256"),
        (lambda file: file.unlink(), r"cannot be read \(No such file or directory\)"),
        (folder_in_place, r"cannot be read \(Is a directory\)"),
    ],
)
def test_a_damaged_inventory_is_named_with_the_way_out(finished, output, linear, damage, message):
    damage(output / "_inputs.parquet")
    with pytest.raises(ScoreError, match=rf"/_inputs\.parquet: this file [^\n]*{message}[^\n]*[;,] restore it from"):
        score(finished[0], output, *PARTS, "--resume", model=linear)


def changed(place, value):
    """Writes _score.json with another value at a place; without the place if the value is `...`."""

    def damage(file):
        description = section = json.loads(file.read_bytes())
        *sections, name = place.split(".")
        for part in sections:
            section = section[part]
        section[name] = value
        if value is ...:
            del section[name]
        file.write_text(json.dumps(description))

    return damage


def huge(file):
    with file.open("r+b") as stream:
        stream.truncate(2**42)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_text('{"format":1}'), "format: Input should be 2"),
        (changed("format", 1), "format: Input should be 2"),
        (changed("format", ...), "format: Field required"),
        (changed("input", ...), "input: Field required"),
        (changed("input.kind", "video"), "input.kind: Input should be 'folder'"),
        (changed("model", []), "model: Input should be an object"),
        (changed("model.classes", "abc"), "model.classes: Input should be a valid"),
        (changed("model.sha256", "0" * 63), "model.sha256: String should match"),
        (changed("options.rows_per_part", True), "options.rows_per_part: Input should be a valid integer"),
        (changed("options.rows_per_part", "20"), "options.rows_per_part: Input should be a valid integer"),
        (changed("options.rows_per_part", 0), "options.rows_per_part: Input should be greater than or equal to 1"),
        (changed("options.max_decode_seconds", float("nan")), "options.max_decode_seconds: Input should be a"),
        (changed("options.max_decode_seconds", float("inf")), "options.max_decode_seconds: Input should be a"),
        (changed("options.new", 1), "options.new: Extra inputs are not permitted"),
        (changed("inventory_sha256", 5), "inventory_sha256: Input should be a valid string"),
        (changed("rows", -1), "rows: Input should be greater than or equal to 0"),
        (lambda file: file.write_text("[]"), "Input should be an object"),
        (lambda file: file.write_text("null"), "Input should be an object"),
        (lambda file: file.write_text("[" * 100_000), "Invalid JSON"),
        (lambda file: file.write_text("no JSON"), "Invalid JSON"),
        (lambda file: file.write_bytes(b""), "Invalid JSON"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "Invalid JSON"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"linear", b"\xff")), "Invalid JSON"),
        (huge, "it has 4,398,046,511,104 bytes; at most 536,870,912 are allowed"),
        (folder_in_place, "cannot be read"),
        (lambda file: file.unlink(), "is missing, but there are parts of a run beside it"),
    ],
)
def test_a_damaged_description_is_named_with_the_way_out(finished, output, linear, damage, reason):
    damage(output / "_score.json")
    with pytest.raises(ScoreError) as caught:
        score(finished[0], output, *PARTS, "--resume", model=linear)
    message = str(caught.value)
    assert message.startswith(f"{output}/_score.json: this file ")
    assert reason in message
    assert message.endswith(" restore it from a copy, or score into another folder")
    assert "\n" not in message


def test_a_lost_inventory_during_the_run_is_named(finished, output, linear, monkeypatch):
    monkeypatch.setattr(OutputFolder, "check_inventory", lambda folder, sha256: folder.inventory.unlink())
    with pytest.raises(ScoreError, match=r"/_inputs\.parquet: this file cannot be read: [^\n]*; restore it and use"):
        score(finished[0], output, *PARTS, "--resume", model=linear)
