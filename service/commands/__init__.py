"""The commands of xlora-serve, one module each; service.cli imports the one that was chosen."""
