"""Nats become weights."""
