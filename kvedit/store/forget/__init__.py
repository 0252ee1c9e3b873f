"""Forgetting for good: erased facts and pruned deltas."""
