"""Trains what a config describes: see ``cfe_lightning.cli.train``, also installed as ``cfe-train``."""

from cfe_lightning.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
