"""Measuring a model and facts of the user's own: speed, memory, strategies, architectures."""
