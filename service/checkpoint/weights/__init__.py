"""What checkpoints hold: experts, classifier, draft head; their tensors, names and hashes."""
