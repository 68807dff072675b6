"""The worker's side of the queue: tasks, leases, recovery, isolation of poison documents. See ``README.md``."""
