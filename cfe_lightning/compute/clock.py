"""Measures time on devices that compute asynchronously."""

import time

import torch


def clock(device: torch.device) -> float:
    """Waits until the device has finished its work and returns the seconds since an arbitrary fixed point."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
