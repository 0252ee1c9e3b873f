"""Facts, their keys, and the files they are read from.  No store, no torch."""
