"""Bodies and answers, as the OpenAPI document has them."""
