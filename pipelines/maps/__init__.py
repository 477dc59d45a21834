"""Model phases, anomalous difference maps and peak heights."""
