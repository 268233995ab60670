"""Input files, result files and alphabets. Nothing here imports torch when it is imported."""
