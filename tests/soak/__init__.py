"""Hours of traffic in minutes: ``make soak`` (``SECONDS=60`` in the whole check), the figures in docs/reliability.md."""
