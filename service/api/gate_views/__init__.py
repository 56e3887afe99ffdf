"""What a caller sees of the gate: groupings, rows, perplexity, the scalings log."""
