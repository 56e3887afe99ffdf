"""Loads a base: checks that it can be served, reads weights, fixes RoPE, quantises, divides it among ranks."""
