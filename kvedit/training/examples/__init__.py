"""Facts as examples, and those that a training starts from."""
