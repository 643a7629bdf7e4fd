"""Search at test time: a policy proposes steps, a scorer ranks them, a method decides where to go on.

Methods (`beam`, `mcts`, ...) are rows of the registry kind `searches`; `mmrl.search.run.search` runs one over prompts.
"""
