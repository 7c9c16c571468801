"""`python -m tokenformer`."""

from .cli.app import main

main()
