"""The demonstrations, their weights and images."""
