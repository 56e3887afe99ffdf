"""Metrics, and the drift of the gate against its profile."""
