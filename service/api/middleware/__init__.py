"""The middleware before the routes, as pure ASGI: the matched route, keys, limits, records, errors."""
