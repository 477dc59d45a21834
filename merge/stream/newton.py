"""Steps for q(F) within a fraction of a pass: what each row has been told, forgetting slowly.

:class:`~braggflux.merge.fit.newton.AmplitudeNewton` moves a row by the part of a batch in the
information of the whole pass before. With data so large that there is no pass before, a row moves
by its gradient over the information that it has gathered so far, this batch included: recursive
least squares, which is as good after any number of observations as a fit to just those. What was
gathered while the scales were still wrong is forgotten in the course of time, by the polynomial
averaging of Shamir & Zhang (2013, ICML 28, 71): weights rise like (t / T)^FORGET.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braggflux.merge.fit.newton import AmplitudeNewton
from braggflux.merge.model.merger import Merger

FORGET = 3.0


class StreamingNewton(AmplitudeNewton):
    """Steps for the parameters of q(F), batch after batch.

    Parameters
    ----------
    merger : Merger
        Its q(F) says what is known before the first batch.
    """

    def __init__(self, merger: Merger) -> None:
        super().__init__(merger)
        self.information = merger.log_concentration.detach().exp()
        self.n_batches = 0

    @torch.no_grad()
    def step(self, information: Tensor, weight: Tensor, damping: float = 1.0) -> None:
        """Use the gradients of a batch, its information and its weight of the prior, (R,) each.

        A batch here may be several of those that the scales see.
        """
        self.n_batches += 1
        kept = self.n_batches / (self.n_batches + FORGET)
        self.information = kept * self.information + information
        self.weight = kept * self.weight + weight
        self._move(self.information, self.weight, damping)
        self._forget()
