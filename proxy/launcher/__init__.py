"""Delivery by the launcher in ``llama-server``'s place: its installation, its question at each load, the answer."""
