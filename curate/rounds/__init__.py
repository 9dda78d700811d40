"""Rounds: what one was begun with, what it wrote and left, how good it was, and what nobody needs any more."""
