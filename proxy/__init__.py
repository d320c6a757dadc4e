"""Everything of lopsided that touches the world: HTTP, GPUs, files, the clock."""
