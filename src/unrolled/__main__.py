"""`python -m unrolled` is the command `unrolled`."""

import sys


def main() -> None:
    """The command; Ctrl-C is no traceback even while its modules are imported."""
    try:
        from unrolled.cli import main as run_command
    except KeyboardInterrupt:
        sys.exit(130)
    run_command()


if __name__ == "__main__":
    main()
