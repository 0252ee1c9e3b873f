"""One edit from plan to commit, checks of what is held, and ``KnowledgeBase``."""
