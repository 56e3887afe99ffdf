"""The API process's end of the engine's socket."""
