"""One small program for each client. It runs a case in a process, and prints one line of JSON."""
