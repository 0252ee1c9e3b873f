"""The model of a revision, written for other programs."""
