"""Device of the arithmetic: CPU or GPU."""

from __future__ import annotations

import os

import torch

from braggflux.integrator.errors import UserError
from braggflux.integrator.processes import ALONE, Processes


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """Device of a name; ``auto`` is cuda where present, of several processes one each.

    Raises
    ------
    UserError
        cuda was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch sees no CUDA device; use --device cpu or auto, or install a "
            "CUDA build of torch"
        )
    if name == "cuda" and not processes.is_alone:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
