"""What a model is: from its file's header, or from what Ollama says of it."""
