"""Step, the interface of everything that runs a batch, and its implementation with CUDA graphs."""
