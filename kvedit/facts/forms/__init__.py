"""Forms of the files that people have: which one a record is in, and its facts."""
