"""Placement for ``/v1``, whose requests carry no options: derived models that nobody sees."""
