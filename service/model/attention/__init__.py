"""Attention over the paged KV cache: the reference, torch's varlen kernel, ours in Triton, and which one runs."""
