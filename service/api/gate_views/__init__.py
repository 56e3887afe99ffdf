"""The gate as callers see it: groupings, rows, perplexity, the scalings log."""
