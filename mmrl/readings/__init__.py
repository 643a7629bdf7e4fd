"""Readings: what fills the fields of a tree between its rewards and its credit."""
