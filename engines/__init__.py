"""Running exported models, and proving them."""
