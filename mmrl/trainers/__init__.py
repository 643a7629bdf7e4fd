"""Trainers: thin loops over pure functions."""
