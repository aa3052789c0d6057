"""Bundles: a file, what it is in plain fields, and a proof that runs where it runs. Made with torch, proven without."""
