"""Windows of ids become nats. Knows no files, devices, optimisers or ranks."""
