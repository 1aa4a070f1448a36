"""`python -m trainer.cli`: the `promptyard` command without its script."""

from trainer.cli import main

main()
