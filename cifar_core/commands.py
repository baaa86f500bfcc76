"""The commands `cifar-train`, `cifar-evaluate` and `cifar-export`, as pyproject.toml names them.

Each imports its module only when it is called, so that an installation without PyTorch gets an error that names the
extra to install.
"""

from cifar_core.errors import needs_extra, run_command


def train() -> None:
    """Runs `cifar-train` and ends the process with its exit code."""
    with needs_extra("train"):
        from cifar_core.train import main
    run_command(main)


def evaluate() -> None:
    """Runs `cifar-evaluate` and ends the process with its exit code."""
    with needs_extra("train"):
        from cifar_core.evaluate import main
    run_command(main)


def export() -> None:
    """Runs `cifar-export` and ends the process with its exit code."""
    with needs_extra("cpu,train"):
        from cifar_core.export import main
    run_command(main)
