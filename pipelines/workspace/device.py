"""Device of the arithmetic: CPU or GPU."""

from __future__ import annotations

import torch

from braggflux.integrator.errors import UserError


def choose_device(name: str) -> torch.device:
    """Device of a name; ``auto`` is cuda where present.

    Raises
    ------
    UserError
        cuda was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch sees no CUDA device; use --device cpu or auto, or install a "
            "CUDA build of torch"
        )
    return torch.device(name)
