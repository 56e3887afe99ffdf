"""Drafts: tokens that may be right, with a likelihood each. What drafts them, and how many pay."""
