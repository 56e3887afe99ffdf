"""X-LoRA in process: the server's engine and checks behind Python calls. Reached as `from service import XLora`."""
