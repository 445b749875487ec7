"""Comparisons: questions, whose variants run on several seeds, and the results with their intervals."""
