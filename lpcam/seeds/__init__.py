"""Maps of one picture: the record that all producers and consumers share, and its mask."""
