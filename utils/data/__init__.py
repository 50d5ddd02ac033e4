"""Data sets: where their files lie, how they are decoded and cached, and how batches are cut."""
