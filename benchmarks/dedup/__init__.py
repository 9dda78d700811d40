"""Near-duplicates: time and recall (`speed`), memory as the pool grows (`memory`), and real pictures (`real`)."""
