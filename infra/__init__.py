"""Everything around the product: the local stack, images and cluster files."""
