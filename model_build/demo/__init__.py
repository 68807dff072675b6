"""The bundled demo model: how it was trained, what it is, and the way back to a checkpoint."""
