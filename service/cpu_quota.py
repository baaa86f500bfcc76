"""How many CPUs this process may use according to its Linux control groups (cgroups).

A container with `--cpus=2` on a 64-core host sees 64 cores. Starting 64 threads there only makes them wait for each
other, because the kernel stops all of them once the quota of a period is used up.

Sources: the kernel's documentation of cgroup v2 (`cpu.max`) and of cgroup v1 (`cpu.cfs_quota_us`,
`cpu.cfs_period_us`), and the manual pages cgroups(7) and proc_pid_mountinfo(5).
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """Number of CPUs that this process may use at once, at least 1.

    The smallest of the CPU affinity (the number of CPUs of the machine, where the system has no affinity) and the CPU
    quotas of the process's control group and of all groups above it, rounded up.

    Args:
        root: Folder that contains `proc` and the mounted control groups.
    """
    # macOS has no affinity.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([float(cpus), *_cpu_quotas(root)])))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in CPUs, of this process's control group and of the groups above it."""
    for group in _groups(root, "cpu"):
        unified = _read(group / "cpu.max").split()  # "max 100000" or "200000 100000", in microseconds
        separate = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]  # "-1" means no quota
        for pair in (unified, separate):
            if len(pair) == 2 and all(number.isdecimal() for number in pair) and int(pair[1]) > 0:
                yield int(pair[0]) / int(pair[1])


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of the groups above it that can be seen, for one controller.

    A container often sees only its own part of the tree: the path in /proc/self/cgroup then begins with the root of the
    mount, as /proc/self/mountinfo shows it, or leads outside of what is mounted.
    """
    paths = dict(_memberships(root))
    for mount_root, mount_point, controllers in _mounts(root):
        key = controller if controller in controllers else "" if not controllers else None
        if key is None or key not in paths:
            continue
        path = PurePosixPath(paths[key])
        inside = path.relative_to(mount_root) if path.is_relative_to(mount_root) else PurePosixPath()
        folder = root / mount_point.lstrip("/")
        yield folder
        for part in inside.parts:
            folder /= part
            yield folder


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """Controller and path of this process's groups; the controller of cgroup v2 is the empty string."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Root, mount point and controllers of each mounted cgroup file system; cgroup v2 has no controllers here."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mount, kind = before.split(), after.split()
        if len(mount) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(kind[-1].split(",")) if kind[0] == "cgroup" else frozenset()
        yield _unescape(mount[3]), _unescape(mount[4]), controllers


def _unescape(path: str) -> str:
    """A path as /proc/self/mountinfo writes it, where each special character is a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)


def _read(path: Path) -> str:
    """The text of a small file; empty if the file cannot be read, so that it sets no limit."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
