"""Models: a registered version is resolved, loaded and asked for predictions of rows."""
