import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.score.errors import ScoreError
from service.score.parquet_rows import ParquetRows
from tests.cifar_core.image_corpus import gradient, saved
from tests.service import exports
from tests.service.score.pictures import assert_classified, packed, rows, score

IMAGES = exports.pictures(50)
NUMBERS = pa.array(IMAGES.ravel())
PIXEL_COLUMNS = {
    "fixed size binary": packed(IMAGES).cast(pa.binary(3072)),
    "binary": packed(IMAGES),
    "large binary": packed(IMAGES).cast(pa.large_binary()),
    "list": pa.ListArray.from_arrays(pa.array(np.arange(51, dtype=np.int32) * 3072), NUMBERS),
    "large list": pa.LargeListArray.from_arrays(pa.array(np.arange(51) * 3072), NUMBERS),
    "fixed size list": pa.FixedSizeListArray.from_arrays(NUMBERS, 3072),
    "binary view": pa.array([image.tobytes() for image in IMAGES], pa.binary_view()),
    "list view": pa.ListViewArray.from_arrays(
        pa.array(np.arange(50, dtype=np.int32) * 3072), pa.array(np.full(50, 3072, np.int32)), NUMBERS
    ),
    "large list view": pa.LargeListViewArray.from_arrays(
        pa.array(np.arange(50) * 3072), pa.array(np.full(50, 3072)), NUMBERS
    ),
}
SIZE = 3000
FILE_TYPES = {
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
    "binary view": pa.binary_view(),
    "fixed size binary": pa.binary(SIZE),
    "fixed size binary, as large as an image": pa.binary(3072),
}


@pytest.mark.parametrize("kind", PIXEL_COLUMNS)
def test_pixels_may_be_stored_as_any_type_of_bytes_or_list(tmp_path, linear, kind):
    pq.write_table(pa.table({"image": PIXEL_COLUMNS[kind]}), tmp_path / "in.parquet", row_group_size=20)
    arguments = (
        tmp_path / "in.parquet",
        tmp_path / "out",
        "--content",
        "pixels",
        "--batch-size",
        7,
        "--rows-per-part",
        15,
    )
    assert score(*arguments, model=linear) == 0
    table = rows(tmp_path / "out")
    assert table["key"].to_pylist() == [f"in.parquet:{row}" for row in range(50)]
    assert_classified(table, IMAGES)


@pytest.mark.parametrize("kind", PIXEL_COLUMNS)
def test_a_row_without_an_image_costs_its_own_row_only(tmp_path, linear, kind):
    column = PIXEL_COLUMNS[kind]
    column = pa.concat_arrays([column.slice(0, 3), pa.nulls(1, column.type), column.slice(3, 4)])
    expected = ["the value is null"]
    if "fixed" not in kind:
        short = column.slice(0, 1).to_pylist()[0][:100]
        column = pa.concat_arrays([column, pa.array([short], column.type)])
        expected.append("has 100 bytes; it must have 3072")
    pq.write_table(pa.table({"image": column}), tmp_path / "in.parquet")
    assert score(tmp_path / "in.parquet", tmp_path / "out", "--content", "pixels", model=linear) == 1
    table = rows(tmp_path / "out")
    errors = [error for error in table["error"].to_pylist() if error]
    assert [reason in error for reason, error in zip(expected, errors, strict=True)] == [True] * len(expected)
    assert_classified(table.filter(pa.compute.is_null(table["error"])), IMAGES[:7])


def test_a_null_within_a_list_of_pixels_costs_its_own_row_only(tmp_path, linear):
    pixels = [image.ravel().tolist() for image in IMAGES[:3]]
    pixels[1][100] = None
    pq.write_table(pa.table({"image": pa.array(pixels, pa.list_(pa.uint8()))}), tmp_path / "in.parquet")
    assert score(tmp_path / "in.parquet", tmp_path / "out", model=linear) == 1
    assert rows(tmp_path / "out")["error"].to_pylist() == [None, "a pixel is null", None]


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize("name", FILE_TYPES)
def test_a_column_of_image_files_is_decoded_whatever_the_type_of_bytes(tmp_path, linear, struct, name):
    kind = FILE_TYPES[name]
    small, large = gradient(32, 32), gradient(200, 300)
    files = [saved(small), b"", None, saved(large, "JPEG"), saved(small, "BMP")]
    if "fixed" in name:
        files = [
            file and file.ljust(kind.byte_width, b"\0") for file in (files[0], bytes(1), None, saved(small, "JPEG"))
        ]
        files.append(saved(small, "WEBP").ljust(kind.byte_width, b"\0"))
    values = [None if file is None else {"bytes": file, "path": None} for file in files] if struct else files
    column = pa.array(values, pa.struct([("bytes", kind), ("path", pa.string())]) if struct else kind)
    pq.write_table(pa.table({"label": [1, 2, 3, 4, 5], "img": column}), tmp_path / "in.parquet")
    options = ("--content", "files") if "as large" in name else ()
    assert score(tmp_path / "in.parquet", tmp_path / "out", "--key", "label", *options, model=linear) == 1
    table = rows(tmp_path / "out")
    assert table["key"].to_pylist() == [1, 2, 3, 4, 5]
    assert [bool(error) for error in table["error"].to_pylist()] == [False, True, True, False, False]
    assert_classified(table.slice(0, 1), np.asarray(small)[None])


def test_a_binary_of_another_fixed_size_is_no_image_column_beside_another_one(tmp_path, linear):
    hashes = pa.array([bytes([row] * 20) for row in range(50)], pa.binary(20))
    pq.write_table(pa.table({"sha1": hashes, "image": PIXEL_COLUMNS["list"]}), tmp_path / "in.parquet")
    assert score(tmp_path / "in.parquet", tmp_path / "out", "--key", "sha1", model=linear) == 0
    assert_classified(rows(tmp_path / "out"), IMAGES)
    with pytest.raises(ScoreError, match=r"'sha1' is of type fixed_size_binary\[20\], which cannot hold pixels"):
        score(tmp_path / "in.parquet", tmp_path / "out2", "--column", "sha1", "--content", "pixels", model=linear)


def test_other_files_beside_the_parquet_files_are_counted(tmp_path, linear, capsys):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": PIXEL_COLUMNS["list"]}), tmp_path / "in/a.parquet")
    for name in ("_SUCCESS", ".a.parquet.crc", "b.PARQUET", "c.parquet.gz"):
        (tmp_path / "in" / name).write_bytes(b"")
    assert score(tmp_path / "in", tmp_path / "out", model=linear) == 0
    assert "2 files are left out because of their extensions: b.PARQUET, c.parquet.gz" in capsys.readouterr().out


def test_a_folder_of_parquet_files_is_read_in_the_order_of_the_names(tmp_path, linear):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"image": packed(IMAGES[:20]), "id": range(20)}), folder / "b.parquet")
    pq.write_table(
        pa.table({"image": packed(IMAGES[20:]), "id": range(20, 50)}), folder / "a.parquet", row_group_size=9
    )
    pq.write_table(pa.table({"other": [1]}), folder / "_metadata.parquet")
    options = ("--content", "pixels", "--key", "id", "--column", "image", "--rows-per-part", 8)
    assert score(folder, tmp_path / "out", *options, model=linear) == 0
    table = rows(tmp_path / "out")
    assert table["key"].to_pylist() == [*range(20, 50), *range(20)]
    assert table.schema.field("key").type == pa.int64()
    assert_classified(table, np.concatenate([IMAGES[20:], IMAGES[:20]]))


def test_columns_that_do_not_fit_are_refused(tmp_path, linear):
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({"a": packed(IMAGES[:2]), "b": packed(IMAGES[:2]), "n": [1, 2]}), file)
    for options, message in (
        ((), "choose the column with the images with --column: a, b"),
        (("--column", "c"), "there is no column 'c'; the columns are: a, b, n"),
        (("--column", "n"), "column 'n' is of type int64, which cannot hold images"),
        (("--column", "a", "--key", "x"), "there is no column 'x'"),
    ):
        with pytest.raises(ScoreError, match=message):
            score(file, tmp_path / "out", *options, model=linear)
    twice = pa.Table.from_arrays([packed(IMAGES[:2])] * 2, ["image", "image"])
    pq.write_table(twice, file)
    for options in ((), ("--column", "image")):
        with pytest.raises(ScoreError, match="column 'image' occurs 2 times; the columns are: image, image"):
            score(file, tmp_path / "out", *options, model=linear)
    pq.write_table(pa.table({"n": [1, 2]}), file)
    with pytest.raises(ScoreError, match=r"no column can hold images.* n \(int64\)"):
        score(file, tmp_path / "out", model=linear)


def test_files_with_different_columns_and_damaged_files_are_refused_by_name(tmp_path, linear):
    pq.write_table(pa.table({"image": packed(IMAGES[:2])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"picture": packed(IMAGES[:2])}), tmp_path / "b.parquet")
    with pytest.raises(ScoreError, match=r"b\.parquet: column 'image' must be of type binary, as in a\.parquet"):
        score(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", model=linear)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(ScoreError, match=r"b\.parquet: this is not a readable Parquet file"):
        score(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", model=linear)


def test_a_damaged_row_group_stops_the_run_and_is_named(tmp_path, linear):
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({"image": packed(IMAGES)}), file, use_dictionary=False, row_group_size=25)
    content = bytearray(file.read_bytes())
    start = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    content[start : start + 30] = bytes(30)
    file.write_bytes(content)
    with pytest.raises(ScoreError, match=r"in\.parquet: row group 1 cannot be read after row 0"):
        score(file, tmp_path / "out", "--content", "pixels", "--rows-per-part", 25, model=linear)
    assert rows(tmp_path / "out").num_rows == 25


def test_files_without_rows_are_named(tmp_path, linear):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in/a.parquet"
    pq.write_table(pa.table({"image": packed(IMAGES[:0])}), file)
    with pytest.raises(ScoreError, match=f"^{file}: the file holds no rows$"):
        score(file, tmp_path / "out", model=linear)
    with pytest.raises(ScoreError, match=rf"^{tmp_path}/in: the folder's \.parquet files hold no rows$"):
        score(tmp_path / "in", tmp_path / "out", model=linear)


def test_parts_of_a_row_group_can_be_read_in_any_order(tmp_path):
    pq.write_table(pa.table({"image": packed(IMAGES[:30])}), tmp_path / "a.parquet")
    source = ParquetRows(tmp_path / "a.parquet", None, "pixels", None)
    source.write_inventory(tmp_path / "inventory", 10)
    for part in (1, 0, 2, 0):
        (found,) = source.rows(tmp_path / "inventory", part, 10)
        assert found.keys.to_pylist() == [f"a.parquet:{row}" for row in range(10 * part, 10 * part + 10)]
        assert (found.pixels == IMAGES[10 * part : 10 * part + 10]).all()
