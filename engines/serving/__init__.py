"""Bundles as what servers take: a Triton model repository, KServe manifests."""
