"""CPU and memory limits of control groups: generated trees, and a real group where this machine lets us make one."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cpu_quota import usable_cpus
from tests.conftest import REPOSITORY

ALL = 512
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture(autouse=True)
def many_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(ALL)), raising=False)


def tree(root: Path, membership: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder with the files that the kernel would show below /proc/self and /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", ALL),
        ("nonsense", ALL),
        ("", ALL),
    ],
)
def test_a_quota_of_cgroup_v2_is_rounded_up_to_whole_cpus(tmp_path, quota, cpus):
    assert usable_cpus(tree(tmp_path, "0::/\n", V2_MOUNT, {"cpu.max": quota})) == cpus


def test_the_smallest_quota_of_the_group_and_the_groups_above_it_counts(tmp_path):
    files = {
        "pods.slice/cpu.max": "400000 100000",
        "pods.slice/pod/cpu.max": "300000 100000",
        "pods.slice/pod/server/cpu.max": "max 100000",
        "other/cpu.max": "100000 100000",
    }
    root = tree(tmp_path, "0::/pods.slice/pod/server\n", V2_MOUNT, files)
    assert usable_cpus(root) == 3


def test_a_container_with_a_namespace_of_its_own_sees_its_quota_at_the_mount_point(tmp_path):
    files = {"cpu.max": "200000 100000"}
    root = tree(tmp_path, "0::/../../outside\n", V2_MOUNT, files)
    assert usable_cpus(root) == 2


@pytest.mark.parametrize(("mount_root", "prefix"), [("/", "docker/4711/"), ("/docker/4711", "")])
def test_cgroup_v1_has_a_quota_too(tmp_path, mount_root, prefix):
    membership = "4:memory:/docker/4711\n3:cpu,cpuacct:/docker/4711\n0::/\n"
    files = {
        f"cpu,cpuacct/{prefix}cpu.cfs_quota_us": "250000",
        f"cpu,cpuacct/{prefix}cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, membership, V1_MOUNTS.format(root=mount_root), files)
    assert usable_cpus(root) == 3


def test_a_quota_that_means_unlimited_sets_no_limit(tmp_path):
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, "4:memory:/\n3:cpu,cpuacct:/\n", V1_MOUNTS.format(root="/"), files)
    assert usable_cpus(root) == ALL


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    assert usable_cpus(tmp_path) == ALL
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_cpus(tmp_path) == 2


def test_systems_without_affinity_such_as_macos_use_the_number_of_cpus(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cpus(tmp_path) == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus(tmp_path) == 1


@contextlib.contextmanager
def real_group() -> Iterator[Path]:
    """A new control group with a quota of half a CPU; the test is skipped where we may not make one."""
    for base, unified in ((Path("/sys/fs/cgroup/cpu"), False), (Path("/sys/fs/cgroup"), True)):
        group = base / f"cifar-test-{os.getpid()}"
        try:
            if unified and not (base / "cgroup.controllers").exists():
                continue
            group.mkdir()
        except OSError:
            continue
        try:
            (group / ("cpu.max" if unified else "cpu.cfs_quota_us")).write_text("50000")
            yield group
        except OSError:
            continue
        else:
            return
        finally:
            group.rmdir()
    pytest.skip("needs the right to make a control group with the cpu controller")


def test_a_real_quota_is_seen_by_a_process_in_the_group():
    script = (
        "import os, sys; from pathlib import Path; from service.cpu_quota import usable_cpus\n"
        "before = usable_cpus(); Path(sys.argv[1]).write_text(str(os.getpid())); print(before, usable_cpus())"
    )
    with real_group() as group:
        done = subprocess.run(
            [sys.executable, "-c", script, str(group / "cgroup.procs")],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    before, inside = map(int, done.stdout.split())
    assert before >= 1
    assert inside == 1
