"""What each family of models is: how its configuration is read, what its tensors are called, its alphabet."""
