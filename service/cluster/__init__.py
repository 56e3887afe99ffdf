"""Replicas of the whole application on Ray Serve. Only this package imports ray, which is the extra `ray`."""
