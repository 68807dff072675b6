"""Shows, exports, redacts and publishes the entities of a run."""
