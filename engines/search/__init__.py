"""Choosing how many tokens to keep: DiffRate's differentiable search of counts."""
