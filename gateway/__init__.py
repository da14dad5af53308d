"""The gateway: OpenAI-compatible HTTP in front of the routers. Torch-free."""
