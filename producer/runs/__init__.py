"""A run from its plan to its end: planning, sending, streams, status, recovery, compaction."""
