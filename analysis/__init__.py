"""One file per analysis: a picture of a record, and the numbers in it."""
