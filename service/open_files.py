"""The limit on open files of this process (RLIMIT_NOFILE). Each connection is one."""

import logging
import resource

logger = logging.getLogger(__name__)

# Files that a server needs besides its connections: sockets to decode processes, the model, metrics, event loops.
_OTHER_FILES = 200


def allow_connections(connections: int) -> None:
    """Raises the soft limit so that this many connections fit, and warns if the hard limit does not allow that.

    Shells often start programs with a soft limit of 1,024 and a much higher hard limit.
    """
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "%d connections (--max-connections) need %d open files, and the hard limit of this process is %d: "
            "raise it (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of Docker) or lower --max-connections",
            connections, needed, hard,
        )  # fmt: skip
