"""Weights and revisions: the base model, rebuilding, exports, a store and a model kept in step."""
