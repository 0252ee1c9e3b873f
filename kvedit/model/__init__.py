"""Loading, prompting, generating with and scoring a causal language model.  No store."""
