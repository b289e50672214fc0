"""`python -m pgcoord_cli` is `pgcoord`. It may be interrupted while it is still loading."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """The `pgcoord` program."""
    try:
        from pgcoord_cli import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
