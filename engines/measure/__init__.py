"""How fast and how accurate files are: timing, benchmarks, profiles by stage, accuracy."""
