"""One module a command of the command line: it parses, calls and prints."""
