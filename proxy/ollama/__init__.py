"""Ollama as its clients see it: endpoints, options, names, what answers and errors say."""
