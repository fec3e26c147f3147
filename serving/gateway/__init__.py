"""The gateway: one door in front of every endpoint's model servers. It forwards requests; it serves no model itself."""
