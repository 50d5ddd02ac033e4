"""What decouples the features of a network that clean images need from the others; a detector and
repairs share it."""
