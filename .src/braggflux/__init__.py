"""From detector photon counts to merged structure-factor amplitudes in one differentiable model.

The packages lie in the folders of the same names at the top of the source tree; here they have one
name in common, so that nothing else of this distribution stands in ``site-packages``.
"""
