"""From frames to shoeboxes: prediction, spot extent, masks, extraction, minibatches."""
