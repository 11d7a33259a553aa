"""Attribution methods of Captum, and a naive descent, behind the same interface."""

from cfe_lightning.methods.baselines.captum import BASELINES, Baseline

__all__ = ["BASELINES", "Baseline"]
