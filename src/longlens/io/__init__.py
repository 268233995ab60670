"""Files and alphabets; imports no torch."""
