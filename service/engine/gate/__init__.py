"""Stored gate rows: which a request is admitted under, which are written, reported and logged."""
