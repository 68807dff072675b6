"""The worker as an operating-system process: command line, supervisor, settings, logs, metrics, tracing."""
