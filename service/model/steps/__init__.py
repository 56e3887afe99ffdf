"""Other ways to run XLoraModel's step: the decode step as one function of tensors, and CUDA graphs of it."""
