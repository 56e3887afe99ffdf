"""Offline tools: parity checks, memory plans, training of draft heads and layers, the two-pass reference."""
