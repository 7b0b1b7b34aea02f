"""`python -m havengate`."""

from havengate.cli import main

main()
