"""The machinery of training, testing and of reading models; it knows no model itself."""
