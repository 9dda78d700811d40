"""The words of arXiv 2406.17711 that a recipe and the selection share."""

from typing import Literal, get_args

Loss = Literal["sigmoid", "softmax"]
Criterion = Literal["learnability", "easy_reference", "hard_learner"]
Decided = Literal["easy_reference", "learnability", "uniform"]
"""What `criterion = "auto"` may come to (`curate.select.standing`)."""
Method = Literal["joint", "independent", "uniform"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
METHODS: tuple[Method, ...] = get_args(Method)
