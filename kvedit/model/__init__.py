"""A causal language model: loaded, placed, asked, scored.  No store."""
