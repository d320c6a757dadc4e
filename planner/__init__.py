"""Places the layers of a language model on unequal GPUs. Pure: no I/O, no clock, no environment, no logging."""
