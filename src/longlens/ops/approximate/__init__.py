"""Softmax approximators in linear time. One method to a file."""
