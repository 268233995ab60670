"""The prediction side: surprise, entropy, rank, top predictions and the logit lens, in chunks of the vocabulary."""
