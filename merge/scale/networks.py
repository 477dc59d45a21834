"""Networks of the scale: residual blocks, and the encoder that describes an image by its spots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 8192  # observations that pass the networks together where nothing is learned


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Split rows, (N, ...), where nothing is learned: each part fits the cache."""
    return (x,) if torch.is_grad_enabled() else torch.split(x, BLOCK)


class ResidualNetwork(nn.Module):
    """Feed-forward blocks with skip connections; the output starts at zero.

    Parameters
    ----------
    n_in, width, depth, n_out : int
    """

    def __init__(self, n_in: int, width: int, depth: int, n_out: int) -> None:
        super().__init__()
        self.first = nn.Linear(n_in, width)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            inner, outer = nn.Linear(width, width), nn.Linear(width, width)
            nn.init.zeros_(outer.weight)
            nn.init.zeros_(outer.bias)
            self.blocks.append(nn.Sequential(nn.SiLU(), inner, nn.SiLU(), outer))
        self.last = nn.Linear(width, n_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in) to (N, n_out)."""
        return torch.cat([self.last(nn.functional.silu(self.hidden(part))) for part in blocks(x)])

    def hidden(self, x: Tensor) -> Tensor:
        """Activations before the last layer, (..., width)."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class ImageEncoder(nn.Module):
    """Description of an image from the set of its reflections, whatever their order.

    Every reflection passes the same residual blocks; the mean over the image passes a linear map.
    """

    def __init__(self, n_in: int, width: int, depth: int, n_out: int) -> None:
        super().__init__()
        self.blocks = ResidualNetwork(n_in, width, depth, 1)
        del self.blocks.last
        self.head = nn.Linear(width, n_out)

    def forward(self, x: Tensor, image: Tensor, is_seen: Tensor, n_images: int) -> Tensor:
        """Pool (N, n_in) over the seen reflections of each image: (n_images, n_out)."""
        total = x.new_zeros(n_images, self.head.in_features)
        for part, into, seen in zip(blocks(x), blocks(image), blocks(is_seen), strict=True):
            hidden = nn.functional.silu(self.blocks.hidden(part)) * seen[:, None]
            total = total.index_add(0, into, hidden)
        count = x.new_zeros(n_images).index_add_(0, image, is_seen.to(x.dtype))
        return self.head(total / count.clamp_min(1.0)[:, None])
