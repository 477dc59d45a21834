"""Tables of observations and what is known of each before a model sees it."""
