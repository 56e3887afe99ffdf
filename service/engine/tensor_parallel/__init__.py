"""Tensor parallelism: one model on several processes. Rank 0's side, the other ranks' process, their messages."""
