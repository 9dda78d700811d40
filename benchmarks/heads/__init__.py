"""Does joint selection make a learner learn faster? On frozen features, where thousands of steps cost seconds."""
