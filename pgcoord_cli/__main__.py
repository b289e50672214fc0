"""`python -m pgcoord_cli` is `pgcoord`."""

from pgcoord_cli.cli import main

main()
