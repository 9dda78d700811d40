"""Selection: windows of an epoch, the super-batches in them, and the sub-batch drawn from each."""
