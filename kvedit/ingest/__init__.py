"""Thousands of facts: a look beforehand, groups, a run that can be resumed."""
