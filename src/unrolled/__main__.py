"""`python -m unrolled` is the command `unrolled`."""

from unrolled.cli import main

main()
