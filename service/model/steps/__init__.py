"""Steps: the interface of all that runs a batch, and CUDA graphs."""
