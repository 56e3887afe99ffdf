"""The engine: requests in, tokens and gate rows out. Knows token ids only: no text, no HTTP."""
