"""The stations of each way of consuming predictions, in the order in which data passes them."""
