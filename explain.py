"""Explains a folder of images; see ``python explain.py --help``."""

from cfe_lightning.cli.explain import main

if __name__ == "__main__":
    raise SystemExit(main())
