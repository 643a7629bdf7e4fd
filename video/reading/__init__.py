"""From a file to frames: decoders, the index of a film, which frames are taken, a worker that can be killed."""
