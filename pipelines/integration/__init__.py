"""From frames to a trained integrator and merged amplitudes."""
