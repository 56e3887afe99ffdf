"""The life of a generating call: from text to a request, from the engine's outputs to events."""
