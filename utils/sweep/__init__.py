"""What sweep.py does: it makes the runs of a grid and launches them."""
