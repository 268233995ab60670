"""Long jobs over many proteins: planned beforehand, safe against being killed, the same result however often."""
