"""A regression head on the vision features of tiny-detector: network, recipe, weights."""
