"""The worker's process: command, supervisor, settings, logs, metrics, tracing."""
