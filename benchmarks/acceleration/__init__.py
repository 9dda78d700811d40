"""Does a learner learn faster from selected batches, and with which settings?"""
