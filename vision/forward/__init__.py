"""Forward passes of token trees: packing, masks, caches, the network that a policy and a reward model share."""
