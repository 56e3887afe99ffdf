"""The HTTP side: wire models, routes, errors. It speaks with the engine through service.client.engine_client alone."""
