"""`python -m ktcore.cli`, for where the command is not on the PATH."""

from ktcore.cli import main

main()
