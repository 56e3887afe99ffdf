"""Files of prompts through an engine: a JSON object a line in, one a line out, resumable."""
