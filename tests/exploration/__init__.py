"""Exploration of the queue's protocol in a simulated world; see README.md."""
