"""Stills read batch by batch: data larger than memory."""
