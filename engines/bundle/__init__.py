"""Bundles: a file, what it is in plain fields, and a proof that runs where it runs. Written here with torch, read and proven without."""
