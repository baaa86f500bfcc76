"""`python -m cifar_core.sweep`."""

from cifar_core.errors import run_command
from cifar_core.sweep.command import main

if __name__ == "__main__":
    run_command(main)
