"""What a user wants known: facts, their keys, and the files they come in.  No store, no torch."""
