"""The models that can be exported: all that is known of timm's modules, and loading them."""
