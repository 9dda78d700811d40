"""The pool: which files are its shards, how rows of them are read, and what makes a row a usable pair."""
