"""What is installed here, what this machine has, and what is fast on it: `longlens doctor`."""
