"""Training loops: of one fact, of a group together, of a group in turn."""
