"""Memory-efficient attention: the exact result over all pairs, tile by tile."""
