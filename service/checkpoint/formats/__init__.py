"""The layouts of checkpoints on disk: bundles, PEFT's and the original library's; reading, writing and converting."""
