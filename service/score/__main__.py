"""`python -m service.score`. Decode processes import this module, so it must import nothing that they do not need."""

if __name__ == "__main__":
    from cifar_core.errors import run_command
    from service.score.command import main

    run_command(main)
