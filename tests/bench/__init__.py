"""The project's own measurements: what is retained, what the base knows, what is undone exactly."""
