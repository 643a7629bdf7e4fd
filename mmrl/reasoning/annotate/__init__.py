"""Annotation: unlabelled steps become labelled steps."""
