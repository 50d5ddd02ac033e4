"""One file per attack: poison a data set, train the victim, save a record."""
