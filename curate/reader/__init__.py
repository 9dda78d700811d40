"""What a trainer meets: committed batches, uniform ones, and a held-out set to evaluate on."""
