"""How fast the mill is: every way to tag the same documents, side by side in one run, and the host's own ceiling."""
