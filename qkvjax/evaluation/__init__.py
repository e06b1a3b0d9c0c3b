"""Scores of trained models, and measures of their attention layers."""

SOLVED = 0.95  # accuracy from which a task counts as learned
