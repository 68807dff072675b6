"""What is done with entities: shown, counted, redacted, exported, published."""
