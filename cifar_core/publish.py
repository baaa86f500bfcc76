"""Replacing the folder of an export as a whole, so that a reader finds the previous export or the new one."""

import argparse
import ctypes
import errno
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from cifar_core.data import Dataset
from cifar_core.errors import CifarError
from cifar_core.manifest import FILE_NAME, Manifest, ManifestError, Variant, parse_manifest, read_manifest

logger = logging.getLogger(__name__)

VARIANT_FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
"""The file of each variant of an export."""


class PublishError(CifarError):
    """The folder of an export cannot be written. Its content is unchanged."""


def add_export_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option --export, which is the same in every command that changes an export."""
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="folder of the export; default: exported (synthetic/exported for synthetic data)",
    )


def warn_if_unmeasured(before: Iterable[Variant], after: Iterable[Variant], folder: Path) -> None:
    """Says that an export has lost measurements with OpenVINO, which it had before."""
    counts = [sum(variant.openvino_precision is not None for variant in variants) for variants in (before, after)]
    if counts[1] < counts[0]:
        logger.warning(
            "the new export is not measured with OpenVINO; a server with --device openvino needs that: "
            "python -m cifar_core.measure_openvino --export %s",
            folder,
        )


def publish(target: Path, files: Mapping[str, bytes]) -> None:
    """Replaces an export as a whole. Files in the folder that do not belong to the previous export are kept.

    Args:
        target: the folder, or a link to it; it need not exist.
        files: content by file name.

    Raises:
        PublishError: The folder cannot be written, for example because the disk is full. Its content is unchanged.
    """
    folder, staging = Path(os.path.realpath(target)), None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        staging.chmod(0o755)
        for name, content in files.items():
            _write(staging / name, content)
        if folder.exists():
            _copy_other_files(folder, staging, exported_files(folder) | files.keys())
            _exchange(staging, folder)
        else:
            staging.rename(folder)
    except OSError as error:
        raise PublishError(
            f"{target}: this folder cannot be written ({error.strerror or error}); its content is unchanged; free some "
            "space, permit writing, or choose another folder"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)  # the previous export, or an incomplete new one


def exported_files(folder: Path) -> set[str]:
    """Names of the files that the export in a folder consists of."""
    try:
        return {FILE_NAME} | {variant.file for variant in read_manifest(folder).variants.values()}
    except ManifestError:  # there is no export yet, or a damaged one
        return {FILE_NAME, *VARIANT_FILES.values()}


def is_intact(folder: Path, manifest: Manifest) -> bool:
    """Whether every file that a manifest names is in the folder and has the SHA-256 of the manifest."""
    try:
        return _match(
            manifest, {variant.file: (folder / variant.file).read_bytes() for variant in manifest.variants.values()}
        )
    except OSError:
        return False


def read_export(folder: Path, dataset: Dataset) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of an export and the content of all its files by name, to change and `replace` it.

    Args:
        folder: the export.
        dataset: the data that it was trained on.

    Raises:
        ManifestError: There is no export in the folder.
        PublishError: A file is damaged, or the export was trained on other data.
    """
    try:
        # Each file is read once, and the digests are those of the bytes that were read: another export may replace this
        # one meanwhile.
        content = (folder / FILE_NAME).read_bytes()
        manifest = parse_manifest(content, folder / FILE_NAME)
        files = {variant.file: (folder / variant.file).read_bytes() for variant in manifest.variants.values()}
    except OSError as error:
        raise PublishError(
            f"{error.filename} cannot be read ({error.strerror}); if the export was just being replaced, start again, "
            "otherwise export the model again"
        ) from error
    if not _match(manifest, files):
        raise PublishError(
            f"{folder}: a file of this export is damaged, or was just being replaced; start again, or export the model "
            "again"
        )
    if manifest.data.fingerprint != dataset.fingerprint:
        raise PublishError(
            f"{folder} was trained on {manifest.data.name or 'unknown data'} (fingerprint "
            f"{manifest.data.fingerprint[:12] or 'unknown'}), but --data is {dataset.name} "
            f"({dataset.fingerprint[:12]}); use the data that it was trained on"
        )
    return manifest, {FILE_NAME: content, **files}


def _match(manifest: Manifest, files: Mapping[str, bytes]) -> bool:
    return all(
        variant.file in files and hashlib.sha256(files[variant.file]).hexdigest() == variant.sha256
        for variant in manifest.variants.values()
    )


def replace(folder: Path, read: Mapping[str, bytes], changed: Mapping[str, bytes]) -> None:
    """Replaces some files of an export, unless it was replaced since it was read.

    Args:
        folder: the export.
        read: all its files, from `read_export`.
        changed: the new content of some of them.

    Raises:
        PublishError: The folder now holds another export, or cannot be written. Its content is unchanged.
    """
    try:
        now = (folder / FILE_NAME).read_bytes()
    except OSError as error:
        raise PublishError(f"{folder / FILE_NAME} cannot be read any more: {error.strerror}") from error
    if now != read[FILE_NAME]:
        raise PublishError(f"{folder} was replaced by another export meanwhile and is unchanged; start again")
    publish(folder, {**read, **changed})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _copy_other_files(source: Path, target: Path, names_left_out: set[str]) -> None:
    for entry in source.iterdir():
        if entry.name in names_left_out:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, target / entry.name, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> None:
    """Swaps two folders in one step, so that a reader always finds one of them, complete.

    Linux can do this on all common file systems. Elsewhere it takes two renames, undone if the second one fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    if hasattr(libc, "renameat2"):
        if libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number))
    aside = first.with_name(first.name + ".aside")
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise
    aside.rename(first)
