"""The story: one file a run that a person starts; a flow only sequences tasks."""
