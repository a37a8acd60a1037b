"""Text: documents, tokens, contexts."""
