"""A plain scale for comparison: 5-degree bins, B and a detector polynomial, robust least squares.

What the program must not fall behind where data are few: some hundred observations for each of
its 90 numbers, Bijvoet mates taken as equal.
"""

from __future__ import annotations

import numpy as np

BIN = 5.0  # [deg]
PRIOR_SD = 0.5  # of a parameter: the mean falloff with resolution cannot be known


def simple_log_scale(unique, rot, position, inv_d2, intensity, sigma, n_rounds=15):
    """Log of the scale of each observation, (N,).

    ``unique`` (N,) numbers the reflections, mates together; ``position`` (N, 2) on the detector.
    """
    design = _design(rot, position, inv_d2)
    parameters, error = np.zeros(design.shape[1]), 0.1
    multiple = np.bincount(unique)[unique] > 1
    for _ in range(n_rounds):
        k = np.exp(design @ parameters)
        value, noise = intensity / k, (sigma / k) ** 2
        mean = _mean(unique, value, 1 / (noise + (error * np.abs(value)) ** 2))[unique]
        variance = noise + (error * mean) ** 2
        residual = value - mean
        weight = 1 / (variance * (1 + residual**2 / variance / 4))  # outliers have little say
        slope = design * mean[:, None]
        centred = slope - _group_mean(unique, slope, weight)
        normal = centred.T @ (weight[:, None] * centred) + np.eye(len(parameters)) / PRIOR_SD**2
        step = centred.T @ (weight * residual) - parameters / PRIOR_SD**2
        parameters = parameters + np.linalg.solve(normal, step)
        strong = multiple & (mean > 10 * np.sqrt(noise))
        error = 1.48 * np.sqrt(2) * np.median(np.abs(residual[strong] / mean[strong]))
    return design @ parameters


def merge_mates(row, value, variance, n):
    """Inverse-variance mean of each row and its sigma, (n,) each; NaN where there is none."""
    weight = np.bincount(row, 1 / variance, n)
    weight[weight == 0] = np.nan
    return np.bincount(row, value / variance, n) / weight, weight**-0.5


def _design(rot, position, inv_d2):
    bins = ((rot - rot.min()) // BIN).astype(int)
    angle = (rot - rot.mean()) / np.ptp(rot)
    x, y = (2 * (position - position.min(0)) / np.ptp(position, axis=0) - 1).T
    powers = [x**i * y**j for i in range(4) for j in range(4 - i) if i + j]
    s = (inv_d2 - inv_d2.mean()) / inv_d2.std()
    return np.column_stack([np.eye(bins.max() + 1)[bins], s * angle, s * angle**2, *powers])


def _mean(group, value, weight):
    total = np.bincount(group, weight)
    return np.bincount(group, weight * value) / np.where(total > 0, total, 1)


def _group_mean(group, columns, weight):
    total = np.bincount(group, weight)
    sums = np.stack([np.bincount(group, weight * c) for c in columns.T], 1)
    return (sums / np.where(total > 0, total, 1)[:, None])[group]
