"""The commands of ``nermill``; what they need is imported when they run, so that ``--help`` is quick."""
