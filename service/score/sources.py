"""Opens an input: finds out what it is."""

from pathlib import Path

from cifar_core.pixels import EXTENSIONS
from service.score.errors import ScoreError
from service.score.image_files import ImageFiles
from service.score.parquet_rows import ParquetRows, parquet_names
from service.score.rows import Content, Kind, Source


def open_source(
    path: Path, column: str | None, content: Content, key: str | None, root: Path | None = None
) -> tuple[Kind, Source]:
    """The kind of an input, and the input.

    Args:
        path: The input.
        column: Column with the images, for Parquet files.
        content: What that column holds; see `ParquetRows`.
        key: Column that identifies the rows, for Parquet files.
        root: Folder that relative paths of a list start from; None for the current folder.

    Raises:
        ScoreError: It does not exist, or its kind is not clear, or an option does not fit it.
    """
    kind = _kind_of(path)
    if kind == "parquet":
        return kind, ParquetRows(path, column, content, key)
    for option, value in (("--column", column), ("--key", key), ("--content", None if content == "auto" else content)):
        if value is not None:
            raise ScoreError(f"{option} is for Parquet files; {path} is a {kind}")
    return kind, ImageFiles(kind, path, path if kind == "folder" else root or Path.cwd())


def _kind_of(path: Path) -> Kind:
    try:
        if path.is_dir():
            return _kind_of_folder(path)
        if not path.exists():
            raise ScoreError(f"{path}: there is no such file or folder")
        if not path.is_file():
            raise ScoreError(f"{path}: this is neither a regular file nor a folder; write the paths to a file")
    except OSError as error:
        raise ScoreError(f"{path}: this cannot be read ({error.strerror})") from error
    if path.name.lower().endswith(EXTENSIONS):
        raise ScoreError(f"{path}: this is one image; give its folder, or a text file with the paths of images")
    return "parquet" if path.suffix == ".parquet" else "list"


def _kind_of_folder(path: Path) -> Kind:
    if not parquet_names(path):
        return "folder"
    image = next((file.name for file in path.iterdir() if file.name.lower().endswith(EXTENSIONS)), None)
    if image is not None:
        raise ScoreError(
            f"{path}: the folder holds .parquet files and images ({image}); move one kind elsewhere, or give a text "
            "file with the paths of the images"
        )
    return "parquet"
