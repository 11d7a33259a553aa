"""Reads the time when a device has finished what it was given."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device) -> float:
    """Waits for the device and returns seconds since some fixed point."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
