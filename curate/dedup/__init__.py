"""Near-duplicates: neighbours above a threshold, groups of them, and which row of each group stays."""
