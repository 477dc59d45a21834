"""Raw detector counts to posteriors over intensity, background and profile."""
