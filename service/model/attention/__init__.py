"""Attention over the paged KV cache: a reference, torch's varlen kernel, our Triton kernel, and their selection."""
