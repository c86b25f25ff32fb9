"""Answers over HTTP, and the one page."""
