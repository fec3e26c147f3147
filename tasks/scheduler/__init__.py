"""From a description of the consumer to the mode that serves it at the lowest cost: online, batch or streaming."""
