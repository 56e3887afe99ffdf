"""Readers of a checkpoint's weights: experts, classifier, draft head and draft layer; tensor files and their hashes."""
