"""Records: the folder of a run, the tensors in it, and the row of its results."""
