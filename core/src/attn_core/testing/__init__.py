"""For tests, ours and vendors': a float64 reference of the vocabulary, and the judge that compares with it."""
