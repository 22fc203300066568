"""Procedural tasks that cannot be solved without their demonstrations, after TrueMICL."""
