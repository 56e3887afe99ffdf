"""Plain data that the API's process and the engine's share. It imports nothing of ours."""
