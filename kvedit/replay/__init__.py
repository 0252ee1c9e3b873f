"""Protected texts, knowledge extraction, and the KL to the base model."""
