"""What is trained and asked of a fact besides its text."""
