"""Connections that cost nothing when they are abused."""
