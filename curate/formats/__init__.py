"""What a pool may be kept in: each format is one file, and `source` opens them all alike. Nothing else reads shards."""
