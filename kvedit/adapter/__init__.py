"""What an edit adds to the weights: AdaLoRA, deltas, the Fisher penalty."""
