"""A Ray cluster on this machine, for tests; nodes of it can be killed.

Its nodes have the address of the machine, as those of `ray start` have. They cannot have 127.0.0.1: `ray.init` replaces
that address by the one of the machine, where nothing would listen.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator

import pytest

# Ray listens at all addresses of the machine and runs the code that callers send, so only those who know this token may
# call it. Ray reads these variables once, when it is imported: import modules that import Ray after this one.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

ray = pytest.importorskip("ray", reason="needs the extra ray, which `make test-slow` installs")
cluster_utils = pytest.importorskip("ray.cluster_utils")


@contextlib.contextmanager
def two_nodes(cpus_of_second: int = 1) -> Iterator["ray.cluster_utils.Cluster"]:
    """A cluster of a head node with one CPU and a second node, which is the attribute `second`."""
    memory = {"object_store_memory": 2**27}
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory}
    )
    try:
        cluster.second = cluster.add_node(num_cpus=cpus_of_second, **memory)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
