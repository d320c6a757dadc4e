"""What a user sets: the environment, ``lopsided.toml``, and its rules for some models."""
