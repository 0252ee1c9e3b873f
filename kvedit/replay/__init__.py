"""What must stay: protected texts, what the base model knows, KL to it."""
