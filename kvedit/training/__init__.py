"""The loops that train a fact or a group, and the engine that runs them."""
