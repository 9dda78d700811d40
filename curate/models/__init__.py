"""Models: what a recipe names, as an open_clip model that lies in the root, and learners as they are published."""
