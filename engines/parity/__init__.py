"""Is a file what its provenance says: comparing, bisecting, reporting."""
