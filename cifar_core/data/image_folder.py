"""A folder of image files -> uint8 arrays, decoded once and cached.

The folder holds `train/<class>/*` and `test/<class>/*`, or only `<class>/*`, which `data.stratify` then splits. Files
are decoded by `cifar_core.images`, the decoder of the server, so that a model sees the same pixels in both. Files that
cannot be read as images are left out and reported.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cifar_core.data.errors import OTHER_DATA, DataError
from cifar_core.data.stratify import Labelled, stratified_split
from cifar_core.files import ARCHIVE_ERRORS
from cifar_core.images import DECODER_VERSION, decode
from cifar_core.pixels import EXTENSIONS, IMAGE_SIZE, ImageRejected

logger = logging.getLogger(__name__)

_CACHE_VERSION = 3
"""Version of the layout of the cache; the decoder has a version of its own."""
_SPLITS = ("train", "test")
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes", "left_out", "notes")
_UNREADABLE = "cannot be read"
_NAMED = 5
"""Number of files that a warning names for each reason."""


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not part of the data set.

    Attributes:
        path: its path below the folder of the data set.
        reason: why it was left out.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    Attributes:
        train: the training set.
        test: the test set.
        classes: the class names that the labels index.
        left_out: what is not part of the data set, ordered by path.
        notes: remarks on the split that a summary should show.
    """

    train: Labelled
    test: Labelled
    classes: list[str]
    left_out: list[LeftOut]
    notes: list[str]


def read_image_folder(folder: Path) -> ImageFolder:
    """Reads a folder, from the cache if it has not changed since the cache was written.

    Files with an extension that is not in `pixels.EXTENSIONS` and damaged files are left out; a warning in the log
    counts and names them.

    Raises:
        DataError: The folder or a class is missing or has no image, there is only one class, train/ and test/ have
            different classes, or a class is too small to be split.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: this folder does not exist; check the path{OTHER_DATA}")
    try:
        parts = _parts(folder)
        file, key = _cache_file(folder), _content_key(folder, parts)
    except OSError as error:  # for example a folder without read permission
        raise DataError(
            f"{error.filename}: this file cannot be read ({error.strerror}); replace or remove it{OTHER_DATA}"
        ) from error
    content = _read_cache(file, key)
    if content is None:
        content = _decode_folder(folder, parts)
        # A file that cannot be read now may be readable later without having changed.
        if not any(entry.reason.startswith(_UNREADABLE) for entry in content.left_out):
            _write_cache(file, key, content)
    _warn(folder, content.left_out)
    return content


def _parts(folder: Path) -> tuple[str, ...]:
    """The folders that hold the class folders: `train` and `test`, or the folder itself.

    A class can have the name `train`, for example of railway trains: its folder then holds images and no folders.
    """
    found = [name for name in _SPLITS if (folder / name).is_dir() and not _is_class(folder / name)]
    if not found:
        return (".",)
    missing = [name for name in _SPLITS if name not in found]
    if missing:
        raise DataError(
            f"{folder}: there is {found[0]}/, but no {missing[0]}/ with class folders; add it, or remove the level "
            f"{found[0]}/ and put all class folders into {folder}, which is then split{OTHER_DATA}"
        )
    return _SPLITS


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is_class(folder: Path) -> bool:
    return not _classes(folder) and any(_is_image(entry.name) and entry.is_file() for entry in os.scandir(folder))


def _classes(folder: Path) -> list[str]:
    """Names of the class folders, in order. Hidden folders are no classes, nor are links to a folder above them."""
    above = {_identity(place) for place in (folder, folder.parent)}
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".") and _identity(entry.path) not in above
    )


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 (three times as fast as pathlib)
    return status.st_dev, status.st_ino


def _files(root: Path, folder: Path) -> tuple[list[str], list[str]]:
    """The path of every file below a class folder, at any depth, in the order of torchvision's ImageFolder.

    Hidden files, which tools write, are ignored.

    Args:
        root: the folder of the data set.
        folder: the class folder.

    Returns:
        The files; and the links to a folder that contains them, which are not followed: they have no end.
    """

    def fail(error: OSError) -> NoReturn:  # os.walk leaves out folders that it cannot read
        raise error

    above = {str(folder): {_identity(place) for place in (root, folder.parent, folder)}}
    found, loops = [], []
    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        containing = above.pop(path)
        for name in tuple(folders):
            inner = f"{path}/{name}"
            if (key := _identity(inner)) in containing:
                folders.remove(name)
                loops.append(inner)
            else:
                above[inner] = containing | {key}
        found.append((path, names))
    files = [f"{path}/{name}" for path, names in sorted(found) for name in sorted(names) if not name.startswith(".")]
    return files, sorted(loops)


def _decode_folder(folder: Path, parts: tuple[str, ...]) -> ImageFolder:
    left_out = _outside_classes(folder, parts)
    labelled, classes = [], []
    for part in parts:
        images, names = _decode_classes(folder, folder / part, left_out)
        labelled.append(images)
        classes.append(names)
    left_out.sort(key=lambda entry: entry.path)
    if classes[0] != classes[-1]:
        different = ", ".join(sorted(set(classes[0]) ^ set(classes[1])))
        raise DataError(
            f"{folder}: train/ and test/ must have the same classes, but only one of them has: {different}; add the "
            f"missing class folders{OTHER_DATA}"
        )
    if len(parts) == 1:
        split = stratified_split(*labelled[0], classes[0], str(folder))
        return ImageFolder(split.train, split.test, classes[0], left_out, split.notes)
    return ImageFolder(labelled[0], labelled[1], classes[0], left_out, [])


def _outside_classes(folder: Path, parts: tuple[str, ...]) -> list[LeftOut]:
    """Files and folders that lie in no class folder. Hidden ones are ignored: they belong to tools."""
    read = {folder: set(parts)} | {folder / part: set(_classes(folder / part)) for part in parts}
    return [
        LeftOut(_printable(folder, entry.path), "not in a class folder")
        for place, names in read.items()
        for entry in os.scandir(place)
        if entry.name not in names and not entry.name.startswith(".")
    ]


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _printable(folder: Path, path: str) -> str:
    """A path below a folder."""
    return printable(os.path.relpath(path, folder))


def _decode_classes(folder: Path, place: Path, left_out: list[LeftOut]) -> tuple[Labelled, list[str]]:
    """Decodes all images of `<place>/<class>/*`, in the order of class and file name; extends `left_out`."""
    classes = _classes(place)
    if len(classes) < 2:
        found = f"only one class ({classes[0]})" if classes else "no class folder"
        raise DataError(f"{place}: there is {found}; at least 2 classes are needed; add one{OTHER_DATA}")
    for name in classes:
        if name.encode(errors="replace").decode() != name:
            raise DataError(f"{_printable(folder, str(place / name))}: the name of this class is not UTF-8; rename it")
    paths = []
    for label, name in enumerate(classes):
        files, loops = _files(folder, place / name)
        paths += [(label, path) for path in files]
        left_out += [LeftOut(_printable(folder, path), "a link to a folder that contains it") for path in loops]
    images = np.empty((len(paths), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels: list[int] = []
    # disable=None: no progress bar unless the output is a terminal
    for label, path in tqdm(paths, desc=f"decoding {place.resolve().name}", unit="image", disable=None):
        try:
            images[len(labels)] = _decode_file(path)
        except ImageRejected as error:
            left_out.append(LeftOut(_printable(folder, path), str(error)))
        else:
            labels.append(label)
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        raise DataError(
            f"{place / classes[empty[0]]}: this class has no readable image (extensions of image files: "
            f"{' '.join(EXTENSIONS)}); add images or remove the empty class{OTHER_DATA}"
        )
    return (images[: len(labels)].copy(), np.asarray(labels, np.int64)), classes


def _decode_file(path: str) -> npt.NDArray[np.uint8]:
    """The pixels of one file, uint8 [32, 32, 3].

    Raises:
        ImageRejected: The file is no image, or a damaged one.
        DataError: The memory does not suffice for it.
    """
    name = Path(path).name
    if not _is_image(name):
        extension = Path(name).suffix.lower() or "none"
        raise ImageRejected(f"extension: {extension}; extensions of image files: {' '.join(EXTENSIONS)}")
    if not Path(path).is_file():
        raise ImageRejected("not a file, or a link to a missing file")
    try:
        return decode(Path(path).read_bytes())
    except OSError as error:
        raise ImageRejected(f"{_UNREADABLE} ({error.strerror})") from error
    except (ImageRejected, MemoryError) as error:
        if not isinstance(error, MemoryError) and not isinstance(error.__cause__, MemoryError):
            raise
        # The fault of the machine at this moment: the file is not left out because of it.
        raise DataError(
            f"{printable(path)}: there is not enough memory to decode this image; free some, or remove the file"
        ) from error


def _warn(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Logs how many files were left out for which reason, with the first names."""
    if not left_out:
        return
    lines = "".join(f"\n  {line}" for line in left_out_lines(left_out))
    logger.warning("%s: %s files or folders were left out:%s", folder, f"{len(left_out):,}", lines)


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """One line for each reason: how many files it applies to, and the first of them."""
    reasons: dict[str, list[str]] = {}
    for entry in left_out:
        reasons.setdefault(entry.reason, []).append(entry.path)
    return [
        f"{len(paths):,} because of: {reason} ({', '.join(paths[:_NAMED])}{', …' if len(paths) > _NAMED else ''})"
        for reason, paths in reasons.items()
    ]


def _content_key(folder: Path, parts: tuple[str, ...]) -> str:
    """A key that changes when a file or class is added, removed, renamed or written.

    It is computed from names, sizes and times: reading 60,000 files would delay every start. The change time (ctime) is
    included because, unlike the modification time, no program can set it.
    """
    digest = hashlib.sha256(f"cache {_CACHE_VERSION}, decoder {DECODER_VERSION}\n".encode())
    for place in (folder, *(folder / part for part in parts)):
        digest.update(f"{sorted(entry.name for entry in os.scandir(place))}\n".encode(errors="surrogateescape"))
    for part in parts:
        for name in _classes(folder / part):
            digest.update(f"{part}: {name}\n".encode(errors="surrogateescape"))
            files, loops = _files(folder, folder / part / name)
            for path in (*files, *loops):
                try:
                    status = os.stat(path)  # noqa: PTH116 (three times as fast as pathlib)
                except OSError:  # a link to a missing file, or to itself
                    status = os.lstat(path)
                text = f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
                digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _cache_file(folder: Path) -> Path | None:
    """The cache of a folder: one file, so that earlier states of the folder do not accumulate.

    None if the user has no home folder, as in a container with an arbitrary user.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        logger.warning(
            "this user has no home folder, so the decoded images are not cached, and are decoded at each start; "
            "set XDG_CACHE_HOME to a folder"
        )
        return None
    return cache / "cifar-core" / (hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16] + ".npz")


def _read_cache(file: Path | None, key: str) -> ImageFolder | None:
    if file is None:
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            train_images, train_labels, test_images, test_labels, classes, left_out, notes = (
                arrays[name] for name in _ARRAYS
            )
            return ImageFolder(
                (train_images, train_labels),
                (test_images, test_labels),
                classes.tolist(),
                [LeftOut(*map(str, row)) for row in left_out],
                notes.tolist(),
            )
    except FileNotFoundError:
        return None
    except (*ARCHIVE_ERRORS, MemoryError) as error:
        logger.warning("%s: this cache cannot be read (%s); the images are decoded again", file, error)
        return None


def _write_cache(file: Path | None, key: str, content: ImageFolder) -> None:
    if file is None:
        return
    left_out = np.asarray([(entry.path, entry.reason) for entry in content.left_out], str).reshape(-1, 2)
    values = (*content.train, *content.test, np.asarray(content.classes), left_out, np.asarray(content.notes, str))
    arrays: dict[str, npt.ArrayLike] = dict(zip(_ARRAYS, values, strict=True))
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, allow_pickle=False, key=np.asarray(key), **arrays)
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        logger.warning(
            "%s: the decoded images could not be cached (%s); they will be decoded again at the next start", file, error
        )
