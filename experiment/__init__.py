"""What the scripts share: data, metrics, files and the machinery of training; no model."""
