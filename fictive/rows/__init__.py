"""Work on rows: looking up or creating one, many at once, links between them."""
