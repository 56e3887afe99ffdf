"""The model: a Hugging Face decoder with stacked experts, a gate and a paged KV cache. Knows rows, not requests."""
