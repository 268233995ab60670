"""Jobs over many proteins: planned in advance, resumable after any interruption, with reproducible results."""
