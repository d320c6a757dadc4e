"""A stand-in Ollama of both eras with simulated GPUs: what ``lopsided demo`` and the tests run against."""
