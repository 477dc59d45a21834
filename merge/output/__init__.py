"""From a fitted model to amplitudes, half sets and statistics."""
