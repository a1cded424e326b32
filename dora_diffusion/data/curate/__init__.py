"""Photos to a training set: a look at each, captions, masks, copies on plain backgrounds."""
