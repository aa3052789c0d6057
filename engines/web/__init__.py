"""A bundle in browsers and Node: a page beside it that runs its proof and shows what becomes of a photo's tokens."""
