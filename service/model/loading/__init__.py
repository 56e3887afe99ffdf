"""What happens to a base before it runs: is it servable, its RoPE, quantisation, its division among ranks."""
