"""Questions to the model, and to its history: nothing here changes a weight."""
