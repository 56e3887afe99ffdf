"""What runs a batch: one interface, and CUDA graphs behind it."""
