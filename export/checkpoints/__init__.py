"""Weights as people have them: read safely, recognised, converted, filled in."""
