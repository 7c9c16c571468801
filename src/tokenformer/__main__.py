"""`python -m tokenformer`."""

from .cli import main

main()
