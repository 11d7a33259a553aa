"""DXAI: images as class-agnostic plus class-distinct parts, by a multi-branch generator."""

from cfe_lightning.methods.dxai.method import Dxai

__all__ = ["Dxai"]
