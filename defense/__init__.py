"""One file per defense: `repair(model, record, config) -> model`."""
