"""`python -m havengate`, and the command `havengate`: the first step, which loads the rest."""

from __future__ import annotations

import sys

from havengate.errors import INTERRUPTED


def main() -> None:
    """Run the command. Ctrl-C while its libraries load ends it in one line, as it does later."""
    try:
        from havengate import cli
    except KeyboardInterrupt:
        sys.stderr.write("havengate: interrupted before it began\n")
        sys.exit(INTERRUPTED)
    cli.main()


if __name__ == "__main__":
    main()
