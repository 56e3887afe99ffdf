"""`response_format`, and calls of functions: from schemas and expressions to what the engine enforces."""
