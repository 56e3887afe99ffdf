"""response_format: from a schema or an expression to what the engine enforces."""
