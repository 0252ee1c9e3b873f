"""Tasks for lm-evaluation-harness on data that are plain files; see docs/guides/harness.md."""
