"""Weights as people have them: read safely (read), found under any prefix (prefixes), renamed (layouts), filled in
(fill)."""
