"""Replacing files of a folder all at once: a reader finds either all previous files or all new ones.

The new files are written to a folder next to it, and the system swaps the two folders in one step. Other files are kept
as they are, with owner, mode and other names, and stay open for programs that write to them: right before the swap they
get a second name in the new folder, so that a reader hardly ever misses one: only if a program creates or renames it
between these two steps, it comes after the swap. Folders, and files on systems that allow no second name, are always
moved right after the swap. A process that is killed in between leaves them in a folder next to it, whose name begins
with a dot; `leftovers` finds it. Only files that the caller names are ever removed.
"""

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping, Set
from pathlib import Path

from cifar_core.errors import CifarError
from cifar_core.files import sync_folder

logger = logging.getLogger(__name__)

_ROUNDS = 100
"""How often the rest of a previous folder is looked for at most."""


class LeftBehind(CifarError):
    """Some files could not be put in their places, and are in another folder, which the message names."""


def replace_files(folder: Path, files: Mapping[str, bytes], replaced: Set[str]) -> None:
    """Replaces files of a folder all at once. The folder keeps its owner and mode, and so does each file with its name.

    Args:
        folder: the folder itself and not a link to it, checked with `check_movable`; it need not exist, but its parent.
        files: content by file name.
        replaced: names of the files to remove; those of `files` are removed, too.

    Raises:
        OSError: The files cannot be written. The folder is unchanged.
        LeftBehind: Something is in another folder now. The message says whether the files were written.
    """
    replaced = replaced | files.keys()
    exists = folder.exists()
    staging = folder.with_name(f".{folder.name}-replacing-{secrets.token_hex(4)}")
    staging.mkdir(mode=0o700 if exists else 0o777)
    linked: dict[str, int] = {}
    try:
        if exists:
            _copy_attributes(folder, staging)
        for name, content in files.items():
            _write(staging / name, content, folder if exists else None)
        sync_folder(staging)
        if exists:  # right before the swap, because programs may replace these files meanwhile
            _link_others(folder, staging, replaced, linked)
        if exists or not _rename(staging, folder):
            _exchange(staging, folder)
        _finish(staging, folder, replaced, linked)
    except LeftBehind:
        raise
    except BaseException:  # also Ctrl+C or SIGTERM, which may come between any two steps
        _finish(staging, folder, replaced, linked)
        raise
    with contextlib.suppress(OSError):  # the new files are in place already
        sync_folder(folder.parent)


def leftovers(folder: Path) -> list[Path]:
    """Folders that processes which were killed, or still run, have made next to a folder to replace files in it."""
    # The word is there because folders of users have names such as .exported-20240101.
    pattern = re.compile(rf"\.{re.escape(folder.name)}-replacing-[0-9a-f]{{8}}(\.aside)?")
    return sorted(path for path in folder.parent.iterdir() if pattern.fullmatch(path.name))


def mount_points() -> set[str]:
    """The files and folders at which something is mounted, so that they cannot be renamed; empty if not on Linux."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    # The fifth field is the path, in which a backslash and three octal digits stand for a space and the like.
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}


def check_movable(folder: Path) -> None:
    """Checks that `replace_files` can keep everything in a folder.

    Raises:
        OSError: It, or something in it, cannot be moved; the message names it.
    """
    if not _may_rename(folder):
        raise OSError(errno.EPERM, f"it belongs to another user, and {folder.parent} is sticky, so it cannot be moved")
    mounted = mount_points()
    for entry in folder.iterdir():
        if not _may_rename(entry):
            raise OSError(errno.EPERM, f"{entry.name} in it belongs to another user, and the folder is sticky")
        if str(entry) in mounted:
            raise OSError(errno.EBUSY, f"{entry.name} in it is a mount point, which cannot be moved")
        # Without this right, the system refuses to move a folder to another.
        if entry.is_dir() and not entry.is_symlink() and not os.access(entry, os.W_OK):
            raise OSError(errno.EACCES, f"the folder {entry.name} in it is not writable, so it cannot be moved")


def _may_rename(entry: Path) -> bool:
    """Whether the sticky bit of the folder around an entry, as /tmp has it, lets this user rename or remove it."""
    around = entry.parent.stat()
    if not around.st_mode & stat.S_ISVTX:
        return True
    try:
        owner = os.lstat(entry).st_uid
    except FileNotFoundError:  # another program has just removed it
        return True
    return os.geteuid() in (0, around.st_uid, owner)


def _write(path: Path, content: bytes, folder: Path | None) -> None:
    """Writes a new file. It takes over owner and mode of the file with its name in `folder`, if there is one."""
    before = folder / path.name if folder is not None else None
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        if folder is not None:
            _keep_owner(folder, path)
        if before is not None and before.is_file():
            _copy_attributes(before, path)
        os.fsync(stream.fileno())


def _copy_attributes(source: Path, target: Path) -> None:
    """Copies owner, mode, access control lists and other extended attributes, but no times."""
    if not _keep_owner(source, target):
        logger.warning(
            "%s belonged to user %d and group %d, to which only root can give it; it has another owner now",
            source,
            source.stat().st_uid,
            source.stat().st_gid,
        )
    shutil.copystat(source, target)
    os.utime(target)


def _keep_owner(source: Path, target: Path) -> bool:
    """Gives a file the owner of another, if the system allows that. Returns whether it has that owner now."""
    wanted, given = source.stat(), target.stat()
    if (wanted.st_uid, wanted.st_gid) == (given.st_uid, given.st_gid):
        return True
    for user, group in ((wanted.st_uid, wanted.st_gid), (-1, wanted.st_gid)):
        with contextlib.suppress(PermissionError):
            os.chown(target, user, group)
            return user != -1
    return False


def _link_others(source: Path, target: Path, replaced: Set[str], linked: dict[str, int]) -> None:
    """Gives all files but the replaced ones a second name in the new folder; records their numbers by name."""
    for entry in source.iterdir():
        if entry.name in replaced or (entry.is_dir() and not entry.is_symlink()):
            continue
        with contextlib.suppress(OSError, NotImplementedError):  # it is moved after the swap
            os.link(entry, target / entry.name, follow_symlinks=False)
            linked[entry.name] = os.lstat(target / entry.name).st_ino


def _number(path: Path) -> int | None:
    """The inode number of a file, folder or link; None if there is none."""
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None


def _finish(staging: Path, folder: Path, replaced: Set[str], linked: Mapping[str, int]) -> None:
    """Puts everything in its place, from whatever state `replace_files` has reached. It may be called again.

    Raises:
        LeftBehind: Something could not be moved.
    """
    aside = _aside(staging)
    if aside.exists():  # an exchange by renames has not ended: it is undone, or completed if the new folder is in place
        try:
            aside.rename(folder if staging.exists() else staging)
        except OSError as error:
            raise LeftBehind(
                f"{folder} could not be replaced, nor put back ({error.strerror}): its previous files are in {aside}; "
                f"move them yourself, and remove that folder and {staging}"
            ) from error
    # Either the previous folder or, if something failed, the new one, of which nothing is needed then.
    if staging.exists():
        _move_others(staging, folder, replaced, linked)


def _move_others(source: Path, target: Path, replaced: Set[str], linked: Mapping[str, int]) -> None:
    """Moves what is not in the new folder yet out of the previous one, and removes that.

    Raises:
        LeftBehind: Something could not be moved. It stays in the previous folder.
    """
    left: set[str] = set()
    # Again, until it is empty: a program may still have created files while this ran, and another process may have
    # replaced the target.
    for _ in range(_ROUNDS):
        # Folders, which are missing for readers, come before the files to remove.
        names = {entry.name for entry in source.iterdir()} - left
        for name in sorted(names, key=lambda name: (name in replaced, name)):
            try:
                if not _move(source / name, target / name, name in replaced, linked.get(name)):
                    left.add(name)
            except FileNotFoundError:
                continue
            except OSError:
                left.add(name)
        if left:
            break
        try:
            source.rmdir()
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                continue
        return
    raise LeftBehind(
        f"{target} holds the new files, but {', '.join(sorted(left)) or 'some files'} could not be moved there, and is "
        f"in {source} now; move it yourself, and remove that folder"
    )


def _move(entry: Path, place: Path, remove: bool, linked: int | None) -> bool:
    """Moves one file or folder, or removes it if it is not needed. Returns False if it is in the way of another.

    Args:
        entry: the file or folder.
        place: where to move it.
        remove: whether it is a file that was replaced.
        linked: the inode number of the file that got a second name at `place`.
    """
    if remove or _number(entry) in (linked, _number(place)):  # the file has a second name at the place, or had one
        entry.unlink()
    elif _number(place) in (None, linked):
        entry.rename(place)
    else:  # a program has created a file of this name in both folders
        return False
    return True


def _rename(staging: Path, folder: Path) -> bool:
    """Gives a new folder its name; returns False if another process has made a folder of this name meanwhile."""
    try:
        staging.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _exchange(first: Path, second: Path) -> None:
    """Swaps two folders in one step, so that a reader always finds one of them, complete.

    Linux can do this on all common file systems. Elsewhere it takes three renames; after a failure or an interruption
    between them, `_finish` undoes or completes them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    if hasattr(libc, "renameat2"):
        if libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number))
    aside = _aside(first)
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def _aside(staging: Path) -> Path:
    """Where the previous folder is during an exchange by renames."""
    return staging.with_name(staging.name + ".aside")
