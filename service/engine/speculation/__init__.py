"""Draft tokens: their sources, their acceptance rates, and how many are worth their rows."""
