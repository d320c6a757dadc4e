"""Fuzzing of what reads other people's bytes: ``make fuzz``; the seeds in tests/data/fuzz are replayed by every ``make test``."""
