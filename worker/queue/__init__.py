"""The worker's side of the queue: tasks, leases, recovery and isolation of poison documents; see ``README.md``."""
