"""How well ways of training together converge, and for how many bytes: the same samples for all of them."""
