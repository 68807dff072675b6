"""From a checkpoint to a compiled artifact that a worker can trust."""
