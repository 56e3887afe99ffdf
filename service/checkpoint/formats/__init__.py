"""How checkpoints lie on disk: bundles, PEFT's layout, the original library's; and the way between them."""
