"""Multiples of a byte, for constants and for what a person reads; everything between is counted in bytes."""

MIB = 2**20
GIB = 2**30
