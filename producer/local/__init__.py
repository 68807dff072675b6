"""A broker and a worker on this machine, for as long as a command lasts."""
