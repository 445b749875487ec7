"""Comparisons: questions, their arms and seeds as ordinary runs, and what came out with its intervals."""
