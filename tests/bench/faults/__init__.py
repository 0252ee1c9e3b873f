"""Faults and inputs: kills, failing calls, power cuts, hostile stores and fuzzing in one table."""
