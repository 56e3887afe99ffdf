"""What runs beside the server: parity checks, memory plans, training of draft heads, the two-pass reference."""
