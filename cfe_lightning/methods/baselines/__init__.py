"""Baselines of the evaluation: attribution methods of Captum and a naive descent, behind one interface."""

from cfe_lightning.methods.baselines.captum import BASELINES, Baseline

__all__ = ["BASELINES", "Baseline"]
