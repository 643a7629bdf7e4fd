"""Step scorers (process reward models): loading them, the labels that they learn from, measures and aggregates.

scorer = load_scorer("runs/prm/final")
scores = score_solutions(scorer, [prompt], [[["2 + 2 = 4", "answer 4"]]])   # [[[.97, .94]]]
"""
