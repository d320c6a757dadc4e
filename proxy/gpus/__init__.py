"""Sources of a rig: NVML, a static profile, a table of cards."""
