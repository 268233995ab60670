"""`python -m longlens`: the command line."""

from longlens.cli.main import main

main()
