"""Files of other programs: weights, BackdoorBench's records, and images in folders with a list."""
