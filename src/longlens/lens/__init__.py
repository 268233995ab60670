"""What a reader wants to know of a model, in linear memory."""
