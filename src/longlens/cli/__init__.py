"""The command line: one module to a command, imported when it runs."""
