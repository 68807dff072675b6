"""The commands of ``nermill``; each imports what it needs when it runs, so that ``--help`` is fast."""
