"""Judging pictures: measures of what a model draws. Each file says which model, if any, it knows."""
