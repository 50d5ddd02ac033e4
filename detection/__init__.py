"""One file per detector: `score(model, record, config)` -> a score for each image, or a Finding."""
