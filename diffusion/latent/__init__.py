"""Judging latents without decoding: the data, the features, the reward model and the judge of candidates."""
