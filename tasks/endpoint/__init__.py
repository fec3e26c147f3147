"""The stations of an endpoint, in the order in which a release passes them."""
