"""What looks at a run from outside: layers and ops know nothing of it, and compute the same bits."""
