"""Losses as pure functions of tensors: of policies, of step reward models, of preferences.

They know no model, tokenizer or modality; a trainer calls them with log-probs or logits.
"""
