"""The parts that an encoder is made of. Each is a small value that says what a family has, and makes its modules."""
