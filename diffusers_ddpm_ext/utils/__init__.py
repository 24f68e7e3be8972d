"""For every floor above: atomic files, keyed randomness, sharded tensors, strict YAML, learning-rate lambdas."""
