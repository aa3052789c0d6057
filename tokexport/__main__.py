"""`python -m tokexport`."""

from .tools.cli import main

main()
