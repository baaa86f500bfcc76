"""The command `python -m cifar_core.report`; see `cifar_core.study.report`."""

from cifar_core.errors import run_command
from cifar_core.study.report import main

if __name__ == "__main__":
    run_command(main)
