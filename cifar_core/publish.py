"""Replacing the folder of an export as a whole, so that a reader finds the previous export or the new one."""

import argparse
import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx

from cifar_core.data import Dataset
from cifar_core.errors import CifarError
from cifar_core.files import path_option, read_regular
from cifar_core.manifest import FILE_NAME, Manifest, ManifestError, Variant, parse_manifest, read_manifest
from cifar_core.replacement import check_movable, leftovers, mount_points, replace_files

logger = logging.getLogger(__name__)

VARIANT_FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
"""The file of each variant of an export."""


class PublishError(CifarError):
    """The folder of an export cannot be written. Its content is unchanged."""


def add_export_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option --export, which is the same in every command that changes an export."""
    parser.add_argument(
        "--export",
        type=path_option,
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


def check_target(target: Path) -> None:
    """Checks, before anything is computed for it, that `publish` may replace a folder.

    Args:
        target: the folder, or a link to it; it need not exist.

    Raises:
        PublishError: It is the current folder or contains it, is a mount point, cannot be written, holds something that
            could not be kept, or a file with the name of a file of an export that is not part of one.
    """
    folder = Path(os.path.realpath(target))
    if not os.path.lexists(folder):
        parent = next(each for each in folder.parents if os.path.lexists(each))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise PublishError(f"{target}: no folder can be made in {parent}; choose another folder")
        return
    if not folder.is_dir():
        raise PublishError(f"{target}: this is not a folder; choose another folder")
    if _contains_current_folder(folder):
        raise PublishError(
            f"{target}: this is the current folder, or contains it; an export replaces its folder as a whole, and "
            "programs that run here would lose their files; choose another folder, or start the command in another one"
        )
    if str(folder) in mount_points():
        raise PublishError(
            f"{target}: this is a mount point, which cannot be replaced; choose a folder in it, such as "
            f"{target / 'exported'}"
        )
    for each in (folder, folder.parent):
        if not os.access(each, os.W_OK | os.X_OK):
            raise PublishError(f"{target}: {each} is not writable; permit writing, or choose another folder")
    try:
        check_movable(folder)
    except OSError as error:
        raise PublishError(f"{target} cannot be replaced: {error.strerror}; choose another folder") from error
    foreign = _foreign_file(folder)
    if foreign is not None:
        raise PublishError(
            f"{target / foreign}: this file is not part of an export of this project, and an export would replace it; "
            "choose another folder (--output), or move the file away"
        )


def _contains_current_folder(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # the current folder has been removed
        here = Path.cwd()
        return any(each.samefile(folder) for each in (here, *here.parents))
    return False


def _foreign_file(folder: Path) -> str | None:
    """The name of a file that an export would replace although it does not belong to one; None if there is none."""
    try:
        known = {variant.file for variant in read_manifest(folder).variants.values()} | {FILE_NAME}
    except ManifestError:
        known = set()
    names = [*VARIANT_FILES.values(), *sorted(known - {FILE_NAME, *VARIANT_FILES.values()}), FILE_NAME]
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            return name
        if name in known or not os.path.lexists(path):
            continue
        if name == FILE_NAME:
            graphs = any(os.path.lexists(folder / each) for each in VARIANT_FILES.values())
            ours = _is_damaged_manifest(path, graphs)
        else:
            ours = _is_graph_of_export(path)
        if not ours:
            return name
    return None


def _is_graph_of_export(path: Path) -> bool:
    """Whether a file is a graph that `export` wrote."""
    try:
        properties = onnx.load_from_string(read_regular(path)).metadata_props
    except Exception:  # noqa: BLE001 (protobuf and onnx raise several kinds for other files)
        return False
    return {"model_version", "classes"} <= {entry.key for entry in properties}


def _is_damaged_manifest(path: Path, beside_graphs: bool) -> bool:
    """Whether a manifest that cannot be read is one of an export: of another version, say, or cut off."""
    try:
        value = json.loads(read_regular(path))
    except OSError:  # no regular file
        return False
    except (ValueError, RecursionError):  # nothing in it says what it was
        return beside_graphs
    return isinstance(value, dict) and {"schema_version", "model_version"} <= value.keys()


def publish(target: Path, files: Mapping[str, bytes]) -> None:
    """Replaces an export as a whole. Files in the folder that do not belong to the previous export are kept.

    The folder and its files keep their owner and mode. New ones get those that the system gives to new files (umask).

    Args:
        target: the folder, or a link to it; it need not exist.
        files: content by file name.

    Raises:
        PublishError: The folder must not be replaced, see `check_target`, or cannot be written, for example because the
            disk is full. Its content is unchanged.
        LeftBehind: Something could not be moved into the folder. The message says whether the export was written.
    """
    check_target(target)
    folder = Path(os.path.realpath(target))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(folder):
            logger.warning(
                "%s is left from an export to %s that was killed; unless one is running, move back what you miss in "
                "%s, and remove it",
                left,
                target,
                target,
            )
        replace_files(folder, files, exported_files(folder))
    except OSError as error:
        raise PublishError(
            f"{target}: this folder cannot be written ({_reason(error)}); its content is unchanged; free some space, "
            "permit writing, or choose another folder"
        ) from error


def _reason(error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return "its file system cannot rename it: it may be part of a container image"
    return error.strerror or str(error)


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
        PublishError: A file is damaged, the export was trained on other data, or `publish` must not replace the folder.
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
    check_target(folder)
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
