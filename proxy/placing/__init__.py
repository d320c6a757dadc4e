"""Which placement each request gets, and for how long."""
