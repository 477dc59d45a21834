"""Options of earlier versions, and what to write instead."""

from __future__ import annotations

from braggflux.integrator.errors import UserError

#: Dotted key of an earlier version -> remedy.
RENAMED = {
    "merge.double_wilson": "true is merge.prior=double-wilson, false merge.prior=wilson",
    "merge.handover": "photon-counts is merge.photon_counts=true, gaussian "
    "merge.photon_counts=false",
    "merge.n_friedel_shells": "it is merge.n_correlation_shells",
    "merge.scale_network_width": "it is merge.detector_network_width",
    "merge.steps_per_epoch": "it is training.merge_steps",
    "merge.final_learning_rate": "leave it out: the rate falls to a hundredth of "
    "merge.learning_rate",
    "merge.n_nodes": "leave it out: the expectation over q(F) has a closed form",
    "merge.relative_error": "leave it out: sdadd of the error model is learned",
    "merge.outlier_fraction": "leave it out: the tail (merge.dof) is learned",
}


def refuse_renamed(key: str) -> None:
    """Refuse an option of an earlier version, with its name of today.

    Raises
    ------
    UserError
        It was one.
    """
    if key in RENAMED:
        raise UserError(f"{key} is an option of an earlier version; {RENAMED[key]}")
