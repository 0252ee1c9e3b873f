"""Ways of teaching a model facts side by side, by the scores of the knowledge-editing papers."""
